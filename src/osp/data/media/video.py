"""Files <-> pixels: probe, read and write videos and images. Pixels are uint8 `C T H W`, RGB, as displayed.

Decoding and colour conversion are libav's (PyAV) and swscale's, still images are Pillow's. Rotation and mirroring by
metadata are applied. Pixels are taken as square: a sample aspect ratio is not applied.
"""

import bisect
import io
import itertools
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from osp.checks import check_number
from osp.errors import DataError, UsageError
from osp.files import write_whole

# Real containers only: a playlist (HLS, concat) that is named .mp4 must not make us open other files or the network.
_OPEN_OPTIONS = {
    "format_whitelist": "mov,matroska,avi,gif,mpegts,mpeg,flv,asf,ogg",
    "protocol_whitelist": "file",
}
_SCALING = (
    Interpolation.BICUBIC  # its kernel widens with the scale when it shrinks: antialiased
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.FULL_CHR_H_INP
    | Interpolation.ACCURATE_RND
    | Interpolation.BITEXACT  # the same pixels on every CPU
)
# AVColorSpace values that swscale converts as they are tagged; BT.2020 constant luminance (10) is close to 9.
_TAGGED_MATRICES = frozenset({1, 4, 5, 6, 7, 9})
_BT2020_CONSTANT_LUMINANCE = 10
_TIME_SLACK = 1e-6  # seconds; timestamps are rational numbers, `start` is a float


class ClipError(DataError):
    """A clip that cannot be read; `str()` is one line, "NAME: reason"."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class VideoInfo:
    """What a file holds. Width and height are as displayed; an image has one frame, fps 0 and duration 0."""

    frames: int
    fps: float  # the mean rate, where it varies
    width: int
    height: int
    duration: float  # seconds
    codec: str
    kind: str  # "video" or "image"


def to_float(video: Tensor) -> Tensor:
    """uint8 0..255 to float32 in [-1, 1], any shape."""
    return video.to(torch.float32) / 127.5 - 1.0


def to_uint8(video: Tensor) -> Tensor:
    """Float in [-1, 1] (clamped) to uint8 0..255 (rounded), any shape."""
    return ((video.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)


def probe(source: Path | bytes, name: str = "", *, decode: bool = False, threads: int = 0) -> VideoInfo:
    """What a video or image file (its path or its bytes) holds.

    Frames are counted by packets and the first one is decoded. With `decode` all of them are: the count is then the
    true one, and damage anywhere in the file is found. `threads` are the decoder's, 0: as many as there are cores.

    Raises:
        ClipError: unreadable, no video in it, or (with `decode`) damaged.
    """
    name = _name(source, name)
    if is_image(source, name):
        image, codec = _open_image(source, name)
        return VideoInfo(1, 0.0, image.width, image.height, 0.0, codec, "image")
    timeline = packet_timeline(source, name)
    times: list[float] = []
    first_pts, size = None, (0, 0)
    with open_video(source, name, threads) as (container, stream):
        codec, nominal = stream.codec_context.codec.canonical_name, float(stream.average_rate or 0)
        for frame, time in decoded_frames(container, stream, name):
            if not times:
                first_pts, size = frame.pts, _displayed_size(frame)
            if not decode and timeline is not None:
                times = timeline.times
                break
            if decode and frame.is_corrupt:
                raise ClipError(name, f"damaged, frame {len(times)} does not decode cleanly")
            times.append(time)
    if not times:
        raise ClipError(name, "no frame of it decodes")
    if decode and timeline is not None and first_pts is not None:
        # Frames before the first one that decodes lean on frames that an earlier cut removed; they are no damage.
        expected = sum(pts >= first_pts for pts in timeline.pts)
        if len(times) < expected:
            raise ClipError(name, f"damaged, only {len(times)} of {expected} frames decode")
    fps = _mean_rate(times, nominal)
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
) -> Tensor:
    """Reads `frames` frames of a video (or an image, with `frames` 1) as uint8 `C T H W`.

    Every `stride`-th frame is taken, or with `fps` the frames nearest in time to that rate (this is right for variable
    frame rates, and repeats frames where the video is slower). The window starts with the frame that is shown `start`
    seconds after the first; else at a position drawn from `generator`; else at the beginning.

    Args:
        source: a path, or the bytes of a file.
        size: (height, width); the picture is scaled (antialiased, aspect kept) to cover it and centre-cropped.
        name: what errors call the clip, where the path does not say it.
        threads: the decoder's, 0: as many as there are cores; 1 inside loader workers.

    Raises:
        ClipError: unreadable or damaged, or too short for the window.
        UsageError: settings that no clip could meet.
    """
    name = _name(source, name)
    check_number("frames", frames, 1, whole=True)
    check_number("stride", stride, 1, whole=True)
    check_number("fps", fps, above=0, null="the video's own")
    if fps is not None and stride != 1:
        raise UsageError(f"stride={stride} and fps={fps} exclude each other: leave one of them out")
    if is_image(source, name):
        if frames != 1:
            raise ClipError(name, f"is an image, {frames} frames needed")
        image, _ = _open_image(source, name)
        return _image_pixels(image, size)[:, None]

    def choose(times: Sequence[float]) -> list[int]:
        if fps is not None:
            return _window_by_time(times, frames, fps, generator, start, name)
        return _window_by_count(times, frames, stride, generator, start, name)

    timeline = packet_timeline(source, name)
    if timeline is not None:
        video = _read_near(source, timeline, choose(timeline.times), size, name, threads)
        if video is not None:
            return video
    # The packets do not tell which frames the decoder gives: look at those first, then read.
    window = _Window(choose(decoded_times(source, name, threads)), size, name)
    with open_video(source, name, threads) as (container, stream):
        for index, (frame, _) in enumerate(decoded_frames(container, stream, name)):
            if window.take(index, frame):
                break
    return window.video()


def write_video(path: Path, video: Tensor, fps: float, *, lossless: bool = False) -> None:
    """Writes `C T H W` (uint8, or float in [-1, 1]) to `path` as MP4; the file appears whole or not at all.

    See `encode_video` for the encoding.
    """
    write_whole(path, encode_video(video, fps, lossless=lossless))


def encode_video(video: Tensor, fps: float, *, lossless: bool = False, threads: int = 0, comment: str = "") -> bytes:
    """Encodes `C T H W` (uint8, or float in [-1, 1]) as H.264 in MP4, with a comment in the container if there is one.

    Lossy is near transparent (CRF 14), BT.709, 4:2:0 for even sizes and 4:4:4 for odd ones, which 4:2:0 cannot hold.
    Lossless is H.264 RGB: the same values come back. The same input, with `threads` 1, gives the same bytes anywhere.

    Raises:
        UsageError: not three channels, no frame, or a rate that is not positive.
    """
    if video.ndim != 4 or video.shape[0] != 3 or 0 in video.shape or not fps > 0:
        raise UsageError(f"a video to write must be 3 T H W at a positive rate, not {tuple(video.shape)} at fps={fps}")
    pixels = (to_uint8(video) if video.is_floating_point() else video).permute(1, 2, 3, 0).contiguous().cpu().numpy()
    rate = Fraction(fps).limit_denominator(1001)
    return encode_pictures(enumerate(pixels), rate, 1 / rate, lossless=lossless, threads=threads, comment=comment)


def encode_pictures(
    pictures: Iterable[tuple[int, NDArray[np.uint8]]],
    rate: Fraction,
    time_base: Fraction,
    *,
    lossless: bool = False,
    threads: int = 0,
    comment: str = "",
) -> bytes:
    """`encode_video` for a stream of (timestamp in `time_base`, `H W C`), which is never held as a whole."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        if comment:
            container.metadata["comment"] = comment
        # Without mbtree: its vector code reads past the end of small pictures, and the bytes then differ by chance.
        codec, options = "libx264", {"crf": "14", "preset": "medium", "mbtree": "0"}
        if lossless:
            codec, options = "libx264rgb", {"qp": "0", "preset": "veryfast"}
        stream = cast(av.VideoStream, container.add_stream(codec, rate=rate, options=options))
        stream.codec_context.time_base = time_base
        stream.codec_context.thread_count = threads
        reformatter = VideoReformatter()
        opened = False
        for timestamp, picture in pictures:
            if not opened:
                opened = True
                stream.height, stream.width = picture.shape[:2]
                even = stream.height % 2 == stream.width % 2 == 0
                stream.pix_fmt = "rgb24" if lossless else "yuv420p" if even else "yuv444p"
                if not lossless:
                    stream.codec_context.colorspace = Colorspace.ITU709
                    stream.codec_context.color_range = ColorRange.MPEG
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if not lossless:
                frame = reformatter.reformat(
                    frame,
                    format=stream.pix_fmt,
                    dst_colorspace=Colorspace.ITU709,
                    dst_color_range=ColorRange.MPEG,
                    interpolation=_SCALING,
                    threads=1,
                )
            frame.pts, frame.time_base = timestamp, time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


# --- frames of a file -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timeline:
    """The frames that the packets announce, in the order of showing."""

    pts: list[int]  # in the stream's time base, strictly increasing
    keys: list[bool]
    clean: list[bool]  # whether the packets before this frame's are just those of the frames before it
    times: list[float]  # seconds after the first


def _name(source: Path | bytes, name: str) -> str:
    return name or (source.name if isinstance(source, Path) else "clip")


@contextmanager
def open_video(
    source: Path | bytes, name: str, threads: int = 1
) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The first video stream of a file (cover pictures are passed over), ready to decode."""
    if (source.stat().st_size if isinstance(source, Path) else len(source)) == 0:
        raise ClipError(name, "the file is empty")
    try:
        # "file:" because a colon in a path would read as a protocol.
        file = f"file:{source}" if isinstance(source, Path) else io.BytesIO(source)
        container = av.open(file, "r", options=_OPEN_OPTIONS, metadata_errors="ignore")
    except (av.FFmpegError, OSError) as error:
        raise ClipError(name, f"not a readable video ({_told(error)})") from error
    with container:
        cover = av.stream.Disposition.attached_pic
        stream = next((stream for stream in container.streams.video if not stream.disposition & cover), None)
        if stream is None:
            raise ClipError(name, "no video stream in it")
        if stream.codec_context is None:
            raise ClipError(name, "this build of PyAV has no decoder for its codec")
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = threads
        yield container, stream


def _told(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def decoded_frames(
    container: av.container.InputContainer, stream: av.VideoStream, name: str
) -> Iterator[tuple[av.VideoFrame, float]]:
    """Every frame from here on, with its time in seconds after the first of them. Raises ClipError at damage."""
    count, first = 0, 0
    rate = stream.average_rate or stream.guessed_rate or Fraction(25)
    try:
        for frame in container.decode(stream):
            if count == 0:
                first = frame.pts or 0
            if frame.pts is not None and frame.time_base is not None:
                yield frame, float((frame.pts - first) * frame.time_base)
            else:
                yield frame, float(count / rate)
            count += 1
    except (av.FFmpegError, OSError, MemoryError) as error:
        raise ClipError(name, f"damaged after {count} decoded frames ({_told(error)})") from error


def decoded_times(source: Path | bytes, name: str, threads: int = 1) -> list[float]:
    """Seconds of each frame after the first, by decoding all of them; evenly spread where timestamps go back (AVI)."""
    with open_video(source, name, threads) as (container, stream):
        times = [time for _, time in decoded_frames(container, stream, name)]
        rate = float(stream.average_rate or stream.guessed_rate or 25)
    if not times:
        raise ClipError(name, "no frame of it decodes")
    if any(later <= time for time, later in itertools.pairwise(times)):
        return [index / rate for index in range(len(times))]
    return times


def packet_timeline(source: Path | bytes, name: str) -> Timeline | None:
    """The frames by the packets' timestamps, without decoding; None where some are missing or not unique."""
    shown: list[tuple[int, bool]] = []
    with open_video(source, name) as (container, stream):
        try:
            for packet in container.demux(stream):
                if packet.size and not packet.is_discard:
                    if packet.pts is None:
                        return None
                    shown.append((packet.pts, packet.is_keyframe))
        except (av.FFmpegError, OSError) as error:
            raise ClipError(name, f"damaged after {len(shown)} packets ({_told(error)})") from error
        time_base, animated = stream.time_base, container.format.name == "gif"
    if not shown:
        raise ClipError(name, "no frame in it")
    coded = [at for at, _ in shown]
    shown.sort()
    pts = [at for at, _ in shown]
    if time_base is None or len(set(pts)) != len(pts):
        return None
    latest = itertools.accumulate(coded, max)
    clean = [True, *(before < at for before, at in zip(latest, pts[1:], strict=False))]
    # A GIF's frames are drawn over the ones before, whatever the packets say.
    keys = [key and not (animated and index) for index, (_, key) in enumerate(shown)]
    return Timeline(pts, keys, clean, [float((at - pts[0]) * time_base) for at in pts])


def _mean_rate(times: Sequence[float], nominal: float) -> float:
    """Frames a second; the container's own figure where the timestamps agree with it to half a percent."""
    rate = (len(times) - 1) / times[-1] if times[-1] > 0 else nominal or 25.0
    return nominal if abs(rate - nominal) < 0.005 * rate else rate


# --- which frames -----------------------------------------------------------------------------------------------------


def _window_by_count(
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


def _window_by_time(
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


# --- pixels -----------------------------------------------------------------------------------------------------------


class _Window:
    """Gathers the wanted frames of a decode into one `C T H W` tensor."""

    def __init__(self, wanted: list[int], size: tuple[int, int] | None, name: str) -> None:
        self._slots: dict[int, list[int]] = {}
        for slot, index in enumerate(wanted):
            self._slots.setdefault(index, []).append(slot)
        self._frames, self._last, self._taken = len(wanted), wanted[-1], 0
        self._size, self._name = size, name
        self._reformatter = VideoReformatter()
        self._pixels: NDArray[np.uint8] | None = None

    def take(self, index: int, frame: av.VideoFrame) -> bool:
        """Keeps the frame if it is wanted; True once the last one is in."""
        slots = self._slots.get(index)
        if slots is not None:
            picture = frame_pixels(frame, self._size, self._reformatter, self._name)
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


def _read_near(
    source: Path | bytes, timeline: Timeline, wanted: list[int], size: tuple[int, int] | None, name: str, threads: int
) -> Tensor | None:
    """Decodes from the last keyframe before the window; None if the decoder's frames are not the packets' ones."""
    key = max((index for index in range(wanted[0] + 1) if timeline.keys[index]), default=0)
    place = {pts: index for index, pts in enumerate(timeline.pts)}
    window = _Window(wanted, size, name)
    expected = key
    with open_video(source, name, threads) as (container, stream):
        try:
            if key > 0:
                container.seek(timeline.pts[key], stream=stream)
            for frame, _ in decoded_frames(container, stream, name):
                index = place.get(frame.pts, -1) if frame.pts is not None else -1
                if 0 <= index < key:
                    continue  # leading frames that the seek met on its way
                if index != expected:
                    return None
                if window.take(index, frame):
                    return window.video()
                expected += 1
        except (av.FFmpegError, OSError, ClipError):
            if key == 0:
                raise
            return None  # this file cannot be sought in: a decode from the start may still do
    return None


def frame_pixels(
    frame: av.VideoFrame, size: tuple[int, int] | None, reformatter: VideoReformatter, name: str
) -> NDArray[np.uint8]:
    """One frame as displayed, `H W C`: colours converted, scaled to cover `size` and cropped, rotated."""
    swap, flip_rows, flip_columns = _orientation(frame)
    height, width = (frame.width, frame.height) if swap else (frame.height, frame.width)
    if size is not None:
        height, width = _cover((height, width), size)
    coded_height, coded_width = (width, height) if swap else (height, width)
    try:
        converted = reformatter.reformat(
            frame,
            width=coded_width,
            height=coded_height,
            format="rgb24",
            src_colorspace=_matrix(frame),
            interpolation=_SCALING,
            threads=1,
        )
        picture = cast(NDArray[np.uint8], converted.to_ndarray())
    except (av.FFmpegError, ValueError) as error:
        raise ClipError(name, f"pixel format {frame.format.name} cannot be converted ({_told(error)})") from error
    if swap:
        picture = picture.transpose(1, 0, 2)
    if flip_rows:
        picture = picture[::-1]
    if flip_columns:
        picture = picture[:, ::-1]
    return picture if size is None else _crop(picture, size)


def _cover(displayed: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The (height, width) that covers `size` and keeps the aspect."""
    scale = max(size[0] / displayed[0], size[1] / displayed[1])
    return max(size[0], round(displayed[0] * scale)), max(size[1], round(displayed[1] * scale))


def _crop(picture: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    top, left = (picture.shape[0] - size[0]) // 2, (picture.shape[1] - size[1]) // 2
    return picture[top : top + size[0], left : left + size[1]]


def _displayed_size(frame: av.VideoFrame) -> tuple[int, int]:
    return (frame.width, frame.height) if _orientation(frame)[0] else (frame.height, frame.width)


def _orientation(frame: av.VideoFrame) -> tuple[bool, bool, bool]:
    """(swap rows and columns, then flip rows, then flip columns) by the frame's display matrix.

    The matrix maps a pixel (x, y) to (a x + c y, b x + d y); angles between the right ones do not occur in practice
    and are taken to the nearest.
    """
    side_data = frame.side_data.get("DISPLAYMATRIX")
    if side_data is None:
        return False, False, False
    a, b, _, c, d = struct.unpack("=5i", bytes(cast(bytes, side_data))[:20])
    if abs(a) >= abs(b):
        return False, d < 0, a < 0
    return True, b < 0, c < 0


def _matrix(frame: av.VideoFrame) -> Colorspace | None:
    """The YUV matrix to assume, None for the frame's own. Untagged video is BT.709 from HD sizes on, as in players."""
    if frame.format.is_rgb or frame.colorspace in _TAGGED_MATRICES:
        return None
    if frame.colorspace == _BT2020_CONSTANT_LUMINANCE:
        return Colorspace.BT2020
    return Colorspace.ITU709 if frame.width >= 1280 or frame.height > 576 else Colorspace.ITU601


# --- still images -----------------------------------------------------------------------------------------------------


def is_image(source: Path | bytes, name: str) -> bool:
    """By the first bytes: JPEG, PNG, WebP, BMP."""
    try:
        head = source[:12] if isinstance(source, bytes) else _head(source)
    except OSError as error:
        raise ClipError(name, f"cannot be opened ({error.strerror})") from error
    return head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n", b"BM")) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(12)


def _open_image(source: Path | bytes, name: str) -> tuple[Image.Image, str]:
    """The decoded picture, turned as its EXIF tag says, RGB, and its format's name."""
    try:
        with Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as image:
            codec = (image.format or "").lower()
            return ImageOps.exif_transpose(image).convert("RGB"), codec
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ClipError(name, f"not a readable image ({_told(error)})") from error


def _image_pixels(image: Image.Image, size: tuple[int, int] | None) -> Tensor:
    """uint8 `C H W`."""
    if size is not None:
        height, width = _cover((image.height, image.width), size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    return torch.from_numpy((pixels if size is None else _crop(pixels, size)).transpose(2, 0, 1).copy())
