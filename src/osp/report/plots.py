"""Plots of many lines in panels, as PNG files."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from osp.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive")
_STYLES = (("-", "o", ""), ("--", "s", "//"), (":", "^", ".."), ("-.", "D", "xx"), ("--", "v", "--"), (":", "x", "++"))
"""The line, the marker on it, and the hatch of a bar."""


@dataclass(frozen=True)
class Line:
    """One line of a plot: the panel it is in, what its colour and its style mean, and (x, y) for each quantity."""

    panel: str
    colour: str
    style: str
    points: Sequence[Sequence[tuple[float, float]]]

    @property
    def label(self) -> str:
        """The line's name in the legend."""
        return f"{self.colour} {self.style}".strip()


def draw_panels(lines: Sequence[Line], x: str, quantities: Sequence[str], title: str) -> "Figure":
    """A row of panels for each quantity, whose axis starts at 0; `x` names what all of them share.

    Lines of one colour, or one style, mean the same in every panel. The axis of x is logarithmic from a factor of 8 on.
    Where all points have the same x, each line is a bar.
    """
    from matplotlib.figure import Figure  # takes its time to load

    panels = list(dict.fromkeys(line.panel for line in lines))
    colours, styles = (_looks(lines, *pair) for pair in (("colour", _COLOURS), ("style", _STYLES)))
    values = sorted({point[0] for line in lines for points in line.points for point in points})
    figure = Figure(figsize=(2 + 4.5 * len(panels), 8), layout="constrained")
    grid = figure.subplots(len(quantities), len(panels), sharex=True, squeeze=False)
    for number, (row, quantity) in enumerate(zip(grid, quantities, strict=True)):
        row[0].set_ylabel(quantity)
        for axes, panel in zip(row, panels, strict=True):
            axes.set_title(panel)
            axes.grid(alpha=0.3)
        for line in lines:
            draw = _draw_bar if len(values) == 1 else _draw_line
            axes = row[panels.index(line.panel)]
            draw(axes, line.points[number], line.label, colours[line.colour], styles[line.style])
    _set_axes(grid, x, values)
    handles = [pair for axes in grid[0] for pair in zip(*axes.get_legend_handles_labels(), strict=True)]
    drawn = {label: handle for handle, label in handles}
    names = (f"{colour} {style}".strip() for colour in colours for style in styles)
    legend = [name for name in names if name in drawn]
    figure.legend([drawn[name] for name in legend], legend, loc="outside lower center", ncols=3)
    figure.suptitle(title, fontsize="medium")
    return figure


def write_figure(path: Path, figure: "Figure") -> None:
    """Write a figure as PNG, as a whole."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_whole(path, image.getvalue())


def _looks(lines: Sequence[Line], what: str, looks: Sequence[Any]) -> dict[str, Any]:
    """A look for each meaning, in the order in which they come."""
    meanings = dict.fromkeys(getattr(line, what) for line in lines)
    return {meaning: looks[number % len(looks)] for number, meaning in enumerate(meanings)}


def _draw_line(
    axes: Any, points: Sequence[tuple[float, float]], label: str, colour: str, style: tuple[str, str, str]
) -> None:
    look = {"color": colour, "linestyle": style[0], "marker": style[1], "label": label}
    axes.plot([x for x, _ in points], [y for _, y in points], **look)


def _draw_bar(
    axes: Any, points: Sequence[tuple[float, float]], label: str, colour: str, style: tuple[str, str, str]
) -> None:
    """A bar to the right of those that are there; without points its place is empty."""
    heights = [y for _, y in points] or [0.0]
    places = range(len(axes.patches), len(axes.patches) + len(heights))
    axes.bar(places, heights, color=colour, hatch=style[2], edgecolor="white", label=label)


def _set_axes(grid: Any, x: str, values: Sequence[float]) -> None:
    for axes in grid.flat:
        if 0 < axes.dataLim.y1 < math.inf:  # memory may be 0 or unknown in all rows
            axes.set_ylim(0, 1.1 * axes.dataLim.y1)
    for below in grid[-1]:
        below.set_xlabel(x)
        if len(values) == 1:
            below.set_xticks([(len(below.patches) - 1) / 2], [str(values[0])])
            continue
        below.set_xscale("log" if values[-1] >= 8 * values[0] else "linear")
        below.set_xticks(values, [str(value) for value in values])
        below.set_xticks([], minor=True)
