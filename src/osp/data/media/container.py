"""Files of moving pictures -> their frames: opened within the limits, decoded in order, their times."""

import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import cast

import av

from osp.data.media.errors import ClipError, told
from osp.data.media.headers import check_headers
from osp.data.media.limits import DEFAULT_LIMITS, Limits
from osp.data.media.stills import animation, is_animation, is_picture

# Real containers only: a playlist (HLS, concat) that is named .mp4 must not make us open other files or the network.
_OPEN_OPTIONS = {
    "format_whitelist": "mov,matroska,avi,gif,mpegts,mpeg,mpegvideo,flv,asf,ogg,mxf,dv,h264,hevc,m4v,ivf",
    "protocol_whitelist": "file",
}
_ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}  # FFmpeg's own leave the transparency of WebM out
_LEAST_STRETCH = Fraction(2, 100)  # of pixels that are not square; less comes from scaling to whole pixels
_MOST_ASPECT = 16  # pixels that are wider or higher than so many times are a mistake in the header
ANIMATION = "animation"  # the `form` of what Pillow reads


class Decoded:
    """How many frames this process has decoded so far, for tests and measurements."""

    frames = 0


@dataclass(frozen=True)
class Movie:
    """An opened file of moving pictures, with its first stream of video (cover pictures are passed over).

    Attributes:
        form: FFmpeg's name of the container; "gif"; or ANIMATION.
        nominal_rate: frames a second as the container says; 0 where it does not.
        aspect: width of a pixel by its height.
    """

    name: str
    form: str
    codec: str
    nominal_rate: Fraction
    time_base: Fraction | None
    aspect: Fraction
    limits: Limits
    decode: Callable[[], Iterator[av.VideoFrame]]
    container: av.container.InputContainer | None = None
    stream: av.VideoStream | None = None
    odd_aspect: str = ""  # the aspect that was not believed

    @property
    def rate(self) -> Fraction:
        """Frames a second, 25 where nothing says so."""
        guessed = self.stream.guessed_rate if self.stream is not None else None
        return self.nominal_rate or guessed or Fraction(25)

    def seek(self, pts: int) -> None:
        """Goes to the last keyframe up to a timestamp; an animation stays at its beginning."""
        if self.container is not None and self.stream is not None:
            self.container.seek(pts, stream=self.stream)

    def packets(self) -> Iterator["av.Packet[av.VideoStream]"]:
        """The packets of frames from here on, none for an animation. Raises ClipError at damage."""
        count = 0
        if self.container is None or self.stream is None:
            return
        try:
            for packet in self.container.demux(self.stream):
                if packet.size and not packet.is_discard:
                    count += 1
                    yield packet
        except (av.FFmpegError, OSError, MemoryError) as error:
            raise ClipError(self.name, f"damaged after {count} packets ({told(error)})") from error

    def frames(self, *, damaged: bool = False) -> Iterator[tuple[av.VideoFrame, float]]:
        """Every frame from here on, with its time in seconds after the first of them.

        Raises ClipError at damage, also at that which the decoder conceals (with `damaged` these frames are given like
        any other), and beyond the limits.
        """
        count, first, size = 0, 0, (0, 0)
        try:
            for frame in self.decode():
                Decoded.frames += 1
                self.limits.check_frames(self.name, count + 1)
                if size != (frame.width, frame.height):
                    size = (frame.width, frame.height)
                    self.limits.check_pixels(self.name, *size)
                if frame.is_corrupt and not damaged:
                    raise ClipError(self.name, f"damaged, frame {count} does not decode cleanly")
                if count == 0:
                    first = frame.pts or 0
                if frame.pts is not None and frame.time_base is not None:
                    time = float((frame.pts - first) * frame.time_base)
                else:
                    time = float(count / self.rate)
                self.limits.check_seconds(self.name, time)
                yield frame, time
                count += 1
        except (av.FFmpegError, OSError, MemoryError) as error:
            # That is what FFmpeg says of frames beyond `max_pixels`.
            hint = f", or frames larger than limits.frame_pixels={self.limits.frame_pixels}"
            reason = told(error) + (hint if isinstance(error, av.ArgumentError) else "")
            raise ClipError(self.name, f"damaged after {count} decoded frames ({reason})") from error


@contextmanager
def open_movie(source: Path | bytes, name: str, threads: int = 1, limits: Limits = DEFAULT_LIMITS) -> Iterator[Movie]:
    """A file of moving pictures, ready to decode. Raises ClipError if it is none, or beyond the limits."""
    if is_picture(source, name):
        if not is_animation(source, name, limits):
            raise ClipError(name, "is a picture, no video")
        draw = partial(_drawn, source, name, limits)
        yield Movie(name, ANIMATION, ANIMATION, Fraction(0), Fraction(1, 1000), Fraction(1), limits, draw)
        return
    if (source.stat().st_size if isinstance(source, Path) else len(source)) == 0:
        raise ClipError(name, "the file is empty")
    check_headers(source, name, limits)
    try:
        # "file:" because a colon in a path would read as a protocol.
        file = f"file:{source}" if isinstance(source, Path) else io.BytesIO(source)
        options = _OPEN_OPTIONS | {"max_pixels": str(limits.frame_pixels)}
        container = av.open(file, "r", options=options, metadata_errors="ignore")
    except (av.FFmpegError, OSError, ValueError, MemoryError) as error:
        raise ClipError(name, f"not a readable video ({told(error)})") from error
    with container:
        yield _movie(container, name, threads, limits)


def _movie(container: av.container.InputContainer, name: str, threads: int, limits: Limits) -> Movie:
    cover = av.stream.Disposition.attached_pic
    stream = next((stream for stream in container.streams.video if not stream.disposition & cover), None)
    if stream is None:
        raise ClipError(name, "no video stream in it")
    context = stream.codec_context
    if context is None:
        raise ClipError(name, "this build of PyAV has no decoder for its codec")
    limits.check_pixels(name, context.width, context.height)
    bounded = {"max_pixels": str(limits.frame_pixels)}
    context.options = bounded
    stream.thread_type = "AUTO"
    context.thread_count = threads
    codec = context.codec.canonical_name

    def decode() -> Iterator[av.VideoFrame]:
        if stream.metadata.get("alpha_mode") != "1" or codec not in _ALPHA_DECODERS:
            yield from container.decode(stream)
            return
        decoder = cast(av.VideoCodecContext, av.CodecContext.create(_ALPHA_DECODERS[codec], "r"))
        decoder.options = bounded
        for packet in container.demux(stream):
            yield from decoder.decode(packet)

    aspect, odd = _aspect(stream)
    rate = stream.average_rate or Fraction(0)
    return Movie(
        name, container.format.name, codec, rate, stream.time_base, aspect, limits, decode, container, stream, odd
    )


def _aspect(stream: av.VideoStream) -> tuple[Fraction, str]:
    """Width of a pixel by its height, 1 where nothing is said; and what the header says, where that cannot be meant."""
    said = stream.sample_aspect_ratio
    if not said or said < 0 or abs(said - 1) <= _LEAST_STRETCH:
        return Fraction(1), ""
    if not Fraction(1, _MOST_ASPECT) <= said <= _MOST_ASPECT:
        return Fraction(1), f"{said.numerator}:{said.denominator}"
    return said, ""


def _drawn(source: Path | bytes, name: str, limits: Limits) -> Iterator[av.VideoFrame]:
    for at, rgba in animation(source, name, limits):
        frame = av.VideoFrame.from_ndarray(rgba, format="rgba")
        frame.pts, frame.time_base = at, Fraction(1, 1000)
        yield frame


# --- times ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timeline:
    """The frames that the packets announce, in the order of showing."""

    pts: list[int]  # in the stream's time base, strictly increasing
    keys: list[bool]
    clean: list[bool]  # whether the packets before this frame's are just those of the frames before it
    times: list[float]  # seconds after the first


def decoded_times(source: Path | bytes, name: str, threads: int = 1, limits: Limits = DEFAULT_LIMITS) -> list[float]:
    """Seconds of each frame after the first, by decoding all of them; evenly spread where timestamps go back (AVI)."""
    with open_movie(source, name, threads, limits) as movie:
        times = [time for _, time in movie.frames()]
        rate = float(movie.rate)
    if not times:
        raise ClipError(name, "no frame of it decodes")
    if any(later <= time for time, later in itertools.pairwise(times)):
        return [index / rate for index in range(len(times))]
    return times


def packet_timeline(source: Path | bytes, name: str, limits: Limits = DEFAULT_LIMITS) -> Timeline | None:
    """The frames by the packets' timestamps, without decoding; None where some are missing or not unique.

    Raises ClipError for more frames or seconds than the limits.
    """
    shown: list[tuple[int, bool]] = []
    with open_movie(source, name, limits=limits) as movie:
        for packet in movie.packets():
            if packet.pts is None:
                return None
            shown.append((packet.pts, packet.is_keyframe))
            limits.check_frames(name, len(shown))
        time_base, form = movie.time_base, movie.form
    if form == ANIMATION:
        return None
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
    keys = [key and not (form == "gif" and index) for index, (_, key) in enumerate(shown)]
    times = [float((at - pts[0]) * time_base) for at in pts]
    limits.check_seconds(name, times[-1])
    return Timeline(pts, keys, clean, times)


def mean_rate(times: Sequence[float], nominal: float) -> float:
    """Frames a second; the container's own figure where the timestamps agree with it to half a percent."""
    rate = (len(times) - 1) / times[-1] if times[-1] > 0 else nominal or 25.0
    return nominal if abs(rate - nominal) < 0.005 * rate else rate
