"""`Part`: the frames of a file, and the rectangle of each, that a clip is."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from osp.data.media.errors import ClipError
from osp.data.media.video_info import VideoInfo

Item = TypeVar("Item")


@dataclass(frozen=True)
class Part:
    """The frames and pixels of its file that a clip is: all of them, unless said otherwise.

    Args:
        cut: its first frame, and the one after its last, numbered from 0 in the order of showing; None: all frames.
        crop: (x0, x1, y0, y1), columns x0 up to but not including x1 and rows y0 up to y1 of the displayed frame, in
            pixels; None: whole frames.
    """

    cut: tuple[int, int] | None = None
    crop: tuple[int, int, int, int] | None = None

    @property
    def first(self) -> int:
        """The number of the clip's first frame in the file."""
        return 0 if self.cut is None else self.cut[0]

    def size(self, shown: tuple[int, int], name: str) -> tuple[int, int]:
        """(height, width) of the clip's frames, where the file's are `shown`. Raises ClipError for a crop beyond it."""
        if self.crop is None:
            return shown
        x0, x1, y0, y1 = self.crop
        if not (0 <= x0 < x1 <= shown[1] and 0 <= y0 < y1 <= shown[0]):
            raise ClipError(
                name,
                f"crop={list(self.crop)} (x0, x1, y0, y1) is no part of frames {shown[1]} wide and {shown[0]} high",
            )
        return y1 - y0, x1 - x0

    def cropped(self, picture: NDArray[np.uint8], name: str) -> NDArray[np.uint8]:
        """The rectangle of a picture `H W C`, not copied. Raises as `size`."""
        if self.crop is None:
            return picture
        self.size((picture.shape[0], picture.shape[1]), name)
        x0, x1, y0, y1 = self.crop
        return picture[y0:y1, x0:x1]

    def taken(self, frames: Sequence[Item], name: str) -> Sequence[Item]:
        """Those of a file's frames, or what there is one of for each, that the clip has.

        Raises ClipError where the file has fewer frames than the clip's last one.
        """
        if self.cut is None:
            return frames
        first, end = self.cut
        if not 0 <= first < end <= len(frames):
            raise ClipError(name, f"cut={list(self.cut)} (first frame, end) is no part of {len(frames)} frames")
        return frames[first:end]

    def times(self, times: Sequence[float], name: str) -> Sequence[float]:
        """Seconds of the clip's frames after its first, of the seconds of all frames of the file. Raises as `taken`."""
        taken = self.taken(times, name)
        return taken if self.cut is None else [time - taken[0] for time in taken]

    def info(self, file: VideoInfo, name: str) -> VideoInfo:
        """The clip's sizes, of those of its file, whose rate is even. Raises ClipError for a part beyond it."""
        height, width = self.size((file.height, file.width), name)
        frames = len(self.taken(range(file.frames), name))
        duration = file.duration if self.cut is None or not file.fps else frames / file.fps
        return replace(file, frames=frames, height=height, width=width, duration=duration)


WHOLE = Part()
