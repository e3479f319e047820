"""Parts of an HTML page: tiles, tables, line charts, and videos that lie in the page itself."""

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from torch import Tensor, cat

from osp.data.media.container import open_movie
from osp.data.media.video import encode_video, probe, read_clip
from osp.documents import MIB, printable, read_bytes
from osp.errors import DataError
from osp.report.markup import Html, joined, tag
from osp.report.records import inside

_PICTURES = {".png": b"\x89PNG\r\n\x1a\n", ".gif": b"GIF8"}  # what a page shows beside MP4, and how it begins
_LARGEST = 512 * MIB  # of a file on the page
_POINTS = 200  # of a curve at most; more are averaged
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 320, 170, 44, 8, 12, 20  # of a chart, and its margins


@dataclass(frozen=True)
class Shown:
    """A video or picture to show: its file, or the folder of its frames, and what stands below it (text or `Html`)."""

    path: Path
    caption: str
    fps: float = 8.0


def section(title: str, text: str, *parts: Html) -> Html:
    """A heading, what the section is about, and its parts."""
    about = [tag("p", text)] if text else []
    return tag("section", joined("", tag("h2", title), *about, *parts, "", between="\n"))


def tiles(values: Iterable[tuple[str, str, str]]) -> Html:
    """Large numbers: of each what it is, the number, and a remark."""
    each = (
        tag("div", tag("span", name), tag("b", value), tag("span", remark), class_="tile")
        for name, value, remark in values
    )
    return tag("div", joined("", *each, "", between="\n"), class_="tiles")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    """Cells are text; after a line break it is small. The first cell of a row is its heading.

    On a narrow screen a row becomes a block: its heading, then a line a cell, which begins with the column's name.
    """

    def cell(name: str, text: str, column: str = "") -> Html:
        first, _, rest = text.partition("\n")
        small = [tag("small", rest)] if rest else []
        return tag(name, first, *small, **({"data_column": column} if column else {}))

    lines = [tag("tr", *(cell("th", text) for text in head), class_="head")] if head else []
    for first, *others in rows:
        columns = head[1:] or [""] * len(others)
        cells = (cell("td", text, column) for text, column in zip(others, columns, strict=True))
        lines.append(tag("tr", cell("th", first), *cells))
    return tag("div", tag("table", joined("", *lines, "", between="\n")), class_="table")


def charts(curves: Mapping[str, Sequence[tuple[int, float]]]) -> Html:
    """A line chart of each curve of (step, value) that has finite values."""
    finite = {name: [point for point in curve if math.isfinite(point[1])] for name, curve in curves.items()}
    each = (tag("figure", _chart(curve), tag("figcaption", name)) for name, curve in finite.items() if curve)
    return tag("div", joined("", *each, "", between="\n"), class_="charts")


def clips(shown: Iterable[Shown], wide: bool = False) -> Html:
    """Videos side by side, that play by themselves again and again."""
    each = (tag("figure", _media(one), tag("figcaption", one.caption)) for one in shown)
    return tag("div", joined("", *each, "", between="\n"), class_="clips wide" if wide else "clips")


def _chart(curve: Sequence[tuple[int, float]]) -> Html:
    points = [chunk.mean(axis=0) for chunk in np.array_split(np.array(curve, dtype=float), min(_POINTS, len(curve)))]
    steps, values = np.array(points).T
    low, high = float(values.min()), float(values.max())
    spread, last = (high - low) or 1.0, float(steps.max()) or 1.0
    x = _LEFT + steps / last * (_WIDTH - _LEFT - _RIGHT)
    y = _TOP + (high - values) / spread * (_HEIGHT - _TOP - _BOTTOM)
    lines = []
    for part in (0.0, 0.5, 1.0):
        level = _TOP + part * (_HEIGHT - _TOP - _BOTTOM)
        lines.append(tag("line", class_="grid", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=f"{level:.1f}", y2=f"{level:.1f}"))
        lines.append(tag("text", _short(high - part * spread), x=_LEFT - 6, y=f"{level + 3:.1f}", text_anchor="end"))
    lines.append(tag("text", 0, x=_LEFT, y=_HEIGHT - 5))
    lines.append(tag("text", f"step {curve[-1][0]}", x=_WIDTH - _RIGHT, y=_HEIGHT - 5, text_anchor="end"))
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    return tag("svg", *lines, tag("polyline", points=path), viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img")


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _media(shown: Shown) -> Html:
    path = shown.path
    if path.suffix in _PICTURES and not path.is_dir():
        data = _bytes(path, _PICTURES[path.suffix])
        probe(data, str(path))
        return tag("img", alt="", src=f"data:image/{path.suffix[1:]};base64,{_base64(data)}")
    source = f"data:video/mp4;base64,{_base64(_playable(path, shown.fps))}"
    return tag("video", autoplay=True, loop=True, muted=True, playsinline=True, src=source)


def _playable(path: Path, fps: float) -> bytes:
    """A video as browsers play it: H.264 with 4:2:0 colours, of an even size. Others are encoded again."""
    if path.is_dir():
        video = _from_frames(path)
    elif path.suffix != ".mp4":
        raise DataError(f"{printable(path)}: is none of {', '.join(_PICTURES)}, .mp4 or a folder of frames")
    else:
        data = _bytes(path, b"ftyp", at=4)
        info = probe(data, str(path))
        with open_movie(data, str(path)) as movie:
            if movie.stream is not None and (info.codec, movie.stream.pix_fmt) == ("h264", "yuv420p"):
                return data
        video, fps = read_clip(data, frames=info.frames, name=str(path)), info.fps
    height, width = video.shape[-2:]
    padded = F.pad(video.float(), (0, width % 2, 0, height % 2, 0, 0), mode="replicate")
    return encode_video(padded.byte(), fps, threads=1)


def _from_frames(folder: Path) -> Tensor:
    files = [inside(folder, file.name) for file in sorted(folder.glob("*.png"))]
    frames = [read_clip(_bytes(file, _PICTURES[".png"]), frames=1, name=str(file)) for file in files]
    if not frames:
        raise DataError(f"{printable(folder)}: has no frames")
    if len({frame.shape for frame in frames}) > 1:
        raise DataError(f"{printable(folder)}: has frames of different sizes")
    return cat(frames, dim=1)


def _bytes(path: Path, mark: bytes, at: int = 0) -> bytes:
    """The content of a file that has the mark of its kind."""
    data = read_bytes(path, _LARGEST)
    if data[at : at + len(mark)] != mark:
        raise DataError(f"{printable(path)}: is no {path.suffix[1:].upper()} file")
    return data


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
