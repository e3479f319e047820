"""Parts of an HTML page: tiles, tables, line charts, and videos that lie in the page itself."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import av
import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import from_numpy, stack

from osp.data.media.video import encode_video, probe, read_clip
from osp.errors import DataError

_POINTS = 200  # of a curve at most; more are averaged
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 320, 170, 44, 8, 12, 20  # of a chart, and its margins


@dataclass(frozen=True)
class Shown:
    """A video or picture to show: its file, or the folder of its frames, and HTML for what stands below it."""

    path: Path
    caption: str
    fps: float = 8.0


def section(title: str, text: str, *parts: str) -> str:
    """A heading, what the section is about, and its parts (HTML)."""
    return "\n".join(
        [f"<section>\n<h2>{escape(title)}</h2>", f"<p>{escape(text)}</p>" if text else "", *parts, "</section>"]
    )


def tiles(values: Iterable[tuple[str, str, str]]) -> str:
    """Large numbers: of each what it is, the number, and a remark."""
    each = (
        f'<div class="tile"><span>{escape(name)}</span><b>{escape(value)}</b><span>{escape(remark)}</span></div>'
        for name, value, remark in values
    )
    return '<div class="tiles">\n' + "\n".join(each) + "\n</div>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are text; after a line break it is small. The first cell of a row is its heading."""

    def cell(tag: str, text: str) -> str:
        first, _, rest = text.partition("\n")
        return f"<{tag}>{escape(first)}{f'<small>{escape(rest)}</small>' if rest else ''}</{tag}>"

    lines = ["".join(cell("th", text) for text in head)] if head else []
    lines += [cell("th", row[0]) + "".join(cell("td", text) for text in row[1:]) for row in rows]
    return '<div class="scroll"><table>\n' + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table></div>"


def charts(curves: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """A line chart of each curve of (step, value)."""
    each = (
        f"<figure>{_chart(curve)}<figcaption>{escape(name)}</figcaption></figure>" for name, curve in curves.items()
    )
    return '<div class="charts">\n' + "\n".join(each) + "\n</div>"


def clips(shown: Iterable[Shown], wide: bool = False) -> str:
    """Videos side by side, that play by themselves again and again."""
    each = (f"<figure>{_media(one)}<figcaption>{one.caption}</figcaption></figure>" for one in shown)
    return f'<div class="clips{" wide" if wide else ""}">\n' + "\n".join(each) + "\n</div>"


def _chart(curve: Sequence[tuple[int, float]]) -> str:
    points = [chunk.mean(axis=0) for chunk in np.array_split(np.array(curve, dtype=float), min(_POINTS, len(curve)))]
    steps, values = np.array(points).T
    low, high = float(values.min()), float(values.max())
    spread, last = (high - low) or 1.0, float(steps.max()) or 1.0
    x = _LEFT + steps / last * (_WIDTH - _LEFT - _RIGHT)
    y = _TOP + (high - values) / spread * (_HEIGHT - _TOP - _BOTTOM)
    lines = []
    for part in (0.0, 0.5, 1.0):
        level = _TOP + part * (_HEIGHT - _TOP - _BOTTOM)
        lines.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{level:.1f}" y2="{level:.1f}"/>')
        lines.append(
            f'<text x="{_LEFT - 6}" y="{level + 3:.1f}" text-anchor="end">{_short(high - part * spread)}</text>'
        )
    lines.append(f'<text x="{_LEFT}" y="{_HEIGHT - 5}">0</text>')
    lines.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 5}" text-anchor="end">step {curve[-1][0]}</text>')
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(lines)}<polyline points="{path}"/></svg>'


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _media(shown: Shown) -> str:
    path = shown.path
    if path.suffix in (".png", ".gif"):
        return f'<img alt="" src="data:image/{path.suffix[1:]};base64,{_base64(_bytes(path))}">'
    source = f"data:video/mp4;base64,{_base64(_playable(path, shown.fps))}"
    return f'<video autoplay loop muted playsinline src="{source}"></video>'


def _playable(path: Path, fps: float) -> bytes:
    """A video as browsers play it: H.264 with 4:2:0 colours, of an even size. Others are encoded again."""
    if path.is_dir():
        frames = [from_numpy(np.array(Image.open(file).convert("RGB"))) for file in sorted(path.glob("*.png"))]
        if not frames:
            raise DataError(f"{path}: has no frames")
        video = stack(frames).permute(3, 0, 1, 2)
    else:
        data = _bytes(path)
        info = probe(data, str(path))
        with av.open(f"file:{path}") as container:
            if (info.codec, container.streams.video[0].codec_context.pix_fmt) == ("h264", "yuv420p"):
                return data
        video, fps = read_clip(data, frames=info.frames, name=str(path)), info.fps
    height, width = video.shape[-2:]
    padded = F.pad(video.float(), (0, width % 2, 0, height % 2, 0, 0), mode="replicate")
    return encode_video(padded.byte(), fps, threads=1)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
