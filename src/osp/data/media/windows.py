"""Times of a file's frames -> the numbers of the frames that a window takes."""

import bisect
from collections.abc import Sequence

import numpy as np
import torch

from osp.data.media.errors import ClipError

_TIME_SLACK = 1e-6  # seconds; timestamps are rational numbers, `start` is a float


def window_by_count(
    times: Sequence[float], frames: int, stride: int, generator: torch.Generator | None, start: float | None, name: str
) -> list[int]:
    need, has = (frames - 1) * stride + 1, len(times)
    by = f"{frames} frames with stride {stride} need {need}" if stride > 1 else f"{need} needed"
    if has < need:
        raise ClipError(name, f"has {has} frames, {by}")
    first = 0
    if start is not None:
        first = max(bisect.bisect_right(times, start + _TIME_SLACK) - 1, 0)
        if has - first < need:
            raise ClipError(name, f"has {has - first} frames from {start:g} s on, {by}")
    elif generator is not None:
        first = int(torch.randint(has - need + 1, (), generator=generator))
    return list(range(first, first + need, stride))


def window_by_time(
    times: Sequence[float], frames: int, fps: float, generator: torch.Generator | None, start: float | None, name: str
) -> list[int]:
    span = (frames - 1) / fps
    # The last frame is on show for a while too: half a frame's time keeps a clip whose rate is `fps` whole.
    end = times[-1] + 0.5 * times[-1] / max(len(times) - 1, 1)
    slack = end - span
    if slack < 0:
        raise ClipError(name, f"has {int(end * fps) + 1} frames at {fps:g} fps, {frames} needed")
    first = 0.0
    if start is not None:
        first = start
        if start > slack + _TIME_SLACK:
            has = max(int((end - start) * fps) + 1, 0)
            raise ClipError(name, f"has {has} frames at {fps:g} fps from {start:g} s on, {frames} needed")
    elif generator is not None:
        first = float(torch.rand((), generator=generator, dtype=torch.float64)) * max(times[-1] - span, 0.0)
    clock = np.asarray(times)
    targets = first + np.arange(frames) / fps
    after = np.searchsorted(clock, targets).clip(1, max(len(clock) - 1, 1))
    before = after - 1
    after = np.minimum(after, len(clock) - 1)
    nearest: list[int] = np.where(targets - clock[before] <= clock[after] - targets, before, after).tolist()
    return nearest
