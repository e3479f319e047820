"""Whole videos in pieces: all frames of a file, decoded once, in memory that does not grow with its length."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from osp.data.media.container import open_movie
from osp.data.media.errors import ClipError
from osp.data.media.frames import Display
from osp.data.media.limits import DEFAULT_LIMITS, Limits
from osp.data.media.part import WHOLE, Part
from osp.data.media.video import is_still, read_clip

_PIXELS = 2**22  # of the frames of a piece: 64 frames of 256 x 256, 2 of 1080 x 1920


def stream_video(
    source: Path | bytes,
    name: str,
    *,
    size: tuple[int, int],
    stride: int = 1,
    fps: float | None = None,
    threads: int = 0,
    limits: Limits = DEFAULT_LIMITS,
    part: Part = WHOLE,
) -> Iterator[Tensor]:
    """All frames of a video (or an image), or of a part of it, in pieces, uint8 `C T H W` of one height and width.

    `size` (height, width), `stride`, `fps` and `part` choose pixels and frames as in `read_clip`. Raises ClipError
    where the file is damaged or ends before the part does, after the pieces before.
    """
    if is_still(source, name, limits):
        yield read_clip(source, frames=1, size=size, name=name, threads=threads, limits=limits, part=part)
        return
    most = max(1, _PIXELS // (size[0] * size[1]))
    held: list[Tensor] = []
    found = False
    with open_movie(source, name, threads, limits) as movie:
        display = Display(name, movie.aspect, size, limits, part)
        for frame, times in _chosen(_inside(movie.frames(), part, name), stride, fps):
            found = True
            picture = torch.from_numpy(np.ascontiguousarray(display.pixels(frame)))
            for _ in range(times):
                held.append(picture)
                if len(held) == most:
                    yield torch.stack(held).permute(3, 0, 1, 2)
                    held = []
    if not found:
        raise ClipError(name, "no frame of it decodes")
    if held:
        yield torch.stack(held).permute(3, 0, 1, 2)


def _inside(
    frames: Iterable[tuple[av.VideoFrame, float]], part: Part, name: str
) -> Iterator[tuple[av.VideoFrame, float]]:
    """The frames of a part, with their times after its first. Raises ClipError if the file ends before it does."""
    if part.cut is None:
        yield from frames
        return
    first, end = part.cut
    begin, count = 0.0, 0
    for frame, time in frames:
        if count == first:
            begin = time
        if count >= first:
            yield frame, time - begin
        count += 1
        if count == end:
            return
    part.taken(range(count), name)


def _chosen(
    frames: Iterable[tuple[av.VideoFrame, float]], stride: int, fps: float | None
) -> Iterator[tuple[av.VideoFrame, int]]:
    """The frames that are taken, and how many times each is: every `stride`-th, or the nearest ones at a rate."""
    if fps is None:
        yield from ((frame, 1) for index, (frame, _) in enumerate(frames) if index % stride == 0)
        return
    taken, before, step = 0, None, 0.0
    for frame, time in frames:
        if before is not None:
            step = time - before[1]
            until = _count(before[1] + step / 2, fps)  # of two frames at the same distance the earlier one is taken
            yield from _repeated(before[0], until - taken)
            taken = max(taken, until)
        before = frame, time
    if before is not None:
        yield from _repeated(before[0], max(_count(before[1] + step / 2, fps), 1) - taken)


def _count(seconds: float, fps: float) -> int:
    """The moments of a rate, the first at 0, up to a time."""
    return int(seconds * fps + 1e-9) + 1


def _repeated(frame: av.VideoFrame, times: int) -> Iterator[tuple[av.VideoFrame, int]]:
    if times > 0:
        yield frame, times
