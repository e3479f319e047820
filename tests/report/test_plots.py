"""Plots of lines in panels."""

from pathlib import Path

from osp.report.plots import Line, draw_panels, write_figure


def test_each_line_is_in_its_panel_and_looks_the_same_everywhere(tmp_path: Path) -> None:
    lines = [
        Line(panel, colour, style, [[(1, 2.0), (9, 4.0)], [(9, 8.0)]])
        for panel in ("encode", "decode")
        for colour in ("small", "")
        for style in ("whole", "stream")
    ]
    figure = draw_panels(lines, "frames", ["speed", "memory"], "a model")
    (speed, other), (memory, _) = (figure.axes[:2], figure.axes[2:])
    assert (speed.get_title(), other.get_title()) == ("encode", "decode")
    assert (speed.get_ylabel(), memory.get_ylabel(), memory.get_xlabel()) == ("speed", "memory", "frames")
    assert memory.get_xscale() == "log"
    assert speed.get_ylim() == (0, 4.4)
    looks = [[(line.get_color(), line.get_linestyle()) for line in axes.get_lines()] for axes in figure.axes]
    assert looks[0] == looks[1] == looks[2] == looks[3]
    assert len(set(looks[0])) == 4
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        *("small whole", "small stream", "whole", "stream")
    ]
    assert [list(line.get_xdata()) for line in memory.get_lines()] == [[9]] * 4
    write_figure(tmp_path / "plot.png", figure)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_lines_of_one_length_are_bars() -> None:
    points = {"sparse": [[(256, 4.0)], [(256, 1.0)]], "dense": [[(256, 2.0)], []]}
    lines = [Line(panel, "", style, points[style]) for panel in ("forward", "train") for style in points]
    figure = draw_panels(lines, "tokens", ["speed", "memory"], "a model")
    assert not any(axes.get_lines() for axes in figure.axes)
    heights = [[bar.get_height() for bar in axes.patches] for axes in figure.axes]
    assert heights == [[4, 2], [4, 2], [1, 0], [1, 0]]
    assert len({bar.get_hatch() for bar in figure.axes[0].patches}) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["sparse", "dense"]
    assert [text.get_text() for text in figure.axes[2].get_xticklabels()] == ["256"]
    assert figure.axes[0].get_ylim() == (0, 4.4)
