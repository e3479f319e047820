"""Files <-> pixels: probe, read and write videos and images. Pixels are uint8 `C T H W`, RGB, as displayed.

Decoding and colour conversion are libav's (PyAV) and swscale's, still images are Pillow's. Rotation and mirroring by
metadata and the aspect of pixels are applied, transparent pictures are laid over white, and of interlaced frames one
field is taken.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from osp.checks import check_number
from osp.data.media.container import Movie, Timeline, decoded_times, mean_rate, open_movie, packet_timeline
from osp.data.media.encode import encode_video, write_video
from osp.data.media.errors import ClipError
from osp.data.media.frames import Display
from osp.data.media.limits import DEFAULT_LIMITS, Limits
from osp.data.media.part import WHOLE, Part
from osp.data.media.stills import is_animation, is_picture, open_still, still_pixels
from osp.data.media.tensors import to_float, to_uint8
from osp.data.media.video_info import VideoInfo
from osp.data.media.windows import window_by_count, window_by_time
from osp.errors import UsageError

__all__ = [
    "ClipError",
    "VideoInfo",
    "encode_video",
    "probe",
    "read_clip",
    "to_float",
    "to_uint8",
    "write_video",
]


def probe(
    source: Path | bytes,
    name: str = "",
    *,
    decode: bool = False,
    threads: int = 0,
    limits: Limits = DEFAULT_LIMITS,
) -> VideoInfo:
    """The sizes, rate and kind of a video or image file (its path or its bytes).

    Frames are counted by packets and the first one is decoded. With `decode` all of them are: the count is then the
    true one, and damage anywhere in the file is found. `threads` are the decoder's, 0: as many as there are cores.

    Raises:
        ClipError: unreadable, no video in it, beyond the limits, or (with `decode`) damaged.
    """
    name = name_of(source, name)
    if is_still(source, name, limits):
        image, codec = open_still(source, name, limits)
        return VideoInfo(1, 0.0, image.width, image.height, 0.0, codec, "image")
    timeline = packet_timeline(source, name, limits)
    times: list[float] = []
    first_pts, size = None, (0, 0)
    with open_movie(source, name, threads, limits) as movie:
        shown = Display(name, movie.aspect, limits=limits)
        for frame, time in movie.frames():
            if not times:
                first_pts, size = frame.pts, shown.shown_size(frame)
            if not decode and timeline is not None:
                times = timeline.times
                break
            times.append(time)
        codec, nominal = movie.codec, float(movie.nominal_rate)
    if not times:
        raise ClipError(name, "no frame of it decodes")
    if decode and timeline is not None and first_pts is not None:
        # Frames before the first one that decodes lean on frames that an earlier cut removed; they are no damage.
        expected = sum(pts >= first_pts for pts in timeline.pts)
        if len(times) < expected:
            raise ClipError(name, f"damaged, only {len(times)} of {expected} frames decode")
    fps = mean_rate(times, nominal)
    return VideoInfo(len(times), fps, size[1], size[0], times[-1] + 1 / fps, codec, "video")


def read_clip(
    source: Path | bytes,
    *,
    frames: int,
    size: tuple[int, int] | None = None,
    stride: int = 1,
    fps: float | None = None,
    generator: torch.Generator | None = None,
    start: float | None = None,
    name: str = "",
    threads: int = 0,
    limits: Limits = DEFAULT_LIMITS,
    part: Part = WHOLE,
) -> Tensor:
    """uint8 `C T H W` of `frames` frames of a video (or of an image, with `frames` 1).

    Every `stride`-th frame is taken, or with `fps` the frames nearest in time to that rate (this is right for variable
    frame rates, and repeats frames where the video is slower). The window starts with the frame that is shown `start`
    seconds after the first; else at a position drawn from `generator`; else at the beginning.

    Args:
        source: a path, or the bytes of a file.
        size: (height, width); the picture is scaled (antialiased, aspect kept) to cover it and centre-cropped.
        name: what errors call the clip, where the path does not say it.
        threads: the decoder's, 0: as many as there are cores; 1 inside loader workers.
        limits: what the file may cost.
        part: the frames and the rectangle of the file that are read, as if it held nothing else: a window lies inside,
            and pixels are scaled after they are cropped.

    Raises:
        ClipError: unreadable, damaged, beyond the limits, without such a part, or too short for the window.
        UsageError: settings that no clip could meet.
    """
    name = name_of(source, name)
    check_number("frames", frames, 1, whole=True)
    check_number("stride", stride, 1, whole=True)
    check_number("fps", fps, above=0, null="the video's own")
    if fps is not None and stride != 1:
        raise UsageError(f"stride={stride} and fps={fps} exclude each other: leave one of them out")
    if is_still(source, name, limits):
        if frames != 1:
            raise ClipError(name, f"is an image, {frames} frames needed")
        image, _ = open_still(source, name, limits)
        return still_pixels(image, size, name, limits, part)[:, None]

    choose = partial(_choose, frames, stride, fps, generator, start, part, name)
    window = partial(_window, size, part)
    timeline = packet_timeline(source, name, limits)
    if timeline is not None:
        video = _read_near(source, timeline, choose(timeline.times), window, name, threads, limits)
        if video is not None:
            return video
    # The packets do not tell which frames the decoder gives: look at those first, then read.
    wanted = choose(decoded_times(source, name, threads, limits))
    with open_movie(source, name, threads, limits) as movie:
        taken = window(wanted, movie)
        for index, (frame, _) in enumerate(movie.frames()):
            if taken.take(index, frame):
                break
    return taken.video()


def _choose(
    frames: int,
    stride: int,
    fps: float | None,
    generator: torch.Generator | None,
    start: float | None,
    part: Part,
    name: str,
    times: Sequence[float],
) -> list[int]:
    """The numbers of the frames of a window, by the times of all frames of the file; see `read_clip`."""
    inside = part.times(times, name)
    if fps is not None:
        chosen = window_by_time(inside, frames, fps, generator, start, name)
    else:
        chosen = window_by_count(inside, frames, stride, generator, start, name)
    return [part.first + index for index in chosen]


def name_of(source: Path | bytes, name: str) -> str:
    """The name of a file in errors."""
    return name or (source.name if isinstance(source, Path) else "clip")


def is_still(source: Path | bytes, name: str, limits: Limits = DEFAULT_LIMITS) -> bool:
    """Whether a file is one picture, by its header: an animation is none. Raises ClipError if it cannot be opened."""
    return is_picture(source, name) and not is_animation(source, name, limits)


class _Window:
    """Gathers the wanted frames of a decode into one `C T H W` tensor."""

    def __init__(self, wanted: list[int], display: Display) -> None:
        self._slots: dict[int, list[int]] = {}
        for slot, index in enumerate(wanted):
            self._slots.setdefault(index, []).append(slot)
        self._frames, self._last, self._taken = len(wanted), wanted[-1], 0
        self._display, self._name = display, display.name
        self._pixels: NDArray[np.uint8] | None = None

    def take(self, index: int, frame: av.VideoFrame) -> bool:
        """Keeps the frame if it is wanted; True once the last one is in."""
        slots = self._slots.get(index)
        if slots is not None:
            picture = self._display.pixels(frame)
            if self._pixels is None:
                self._pixels = np.empty((3, self._frames, *picture.shape[:2]), dtype=np.uint8)
            if picture.shape[:2] != self._pixels.shape[2:]:
                raise ClipError(self._name, "its frame size changes on the way; give a size to read it with")
            self._pixels[:, slots] = picture.transpose(2, 0, 1)[:, None]
            self._taken += len(slots)
        return index >= self._last

    def video(self) -> Tensor:
        """uint8 `C T H W`; raises ClipError if the decode ended before the window did."""
        if self._pixels is None or self._taken < self._frames:
            raise ClipError(self._name, f"only {self._taken} of {self._frames} wanted frames decode")
        return torch.from_numpy(self._pixels)


def _window(size: tuple[int, int] | None, part: Part, wanted: list[int], movie: Movie) -> _Window:
    return _Window(wanted, Display(movie.name, movie.aspect, size, movie.limits, part))


def _read_near(
    source: Path | bytes,
    timeline: Timeline,
    wanted: list[int],
    window: Callable[[list[int], Movie], _Window],
    name: str,
    threads: int,
    limits: Limits,
) -> Tensor | None:
    """Decodes from the last keyframe before the window; None if the decoder's frames are not the packets' ones.

    Raises ClipError where a frame from there on is damaged: the following ones lean on it.
    """
    key = max((index for index in range(wanted[0] + 1) if timeline.keys[index]), default=0)
    place = {pts: index for index, pts in enumerate(timeline.pts)}
    expected = key
    with open_movie(source, name, threads, limits) as movie:
        taken = window(wanted, movie)
        try:
            if key > 0:
                movie.seek(timeline.pts[key])
            for frame, _ in movie.frames(damaged=True):
                index = place.get(frame.pts, -1) if frame.pts is not None else -1
                if 0 <= index < key:
                    continue  # leading frames that the seek met on its way
                if index != expected:
                    return None
                if frame.is_corrupt:
                    raise ClipError(name, f"damaged, frame {index} does not decode cleanly")
                if taken.take(index, frame):
                    return taken.video()
                expected += 1
        except (av.FFmpegError, OSError, ClipError):
            if key == 0:
                raise
            return None  # this file cannot be sought in: a decode from the start may still do
    return None
