"""Source file -> clips: where to cut it, the cut itself, and the check that every frame of a clip decodes.

Original bytes are kept where that is possible. A file short enough to be one clip is stored as it is. A longer one is
cut at keyframes by copying its packets; only a piece that has no keyframe to begin with is encoded anew.
"""

import bisect
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray
from PIL import Image

from osp.data.media.video import (
    ClipError,
    Timeline,
    VideoInfo,
    decoded_frames,
    decoded_times,
    encode_pictures,
    frame_pixels,
    is_image,
    open_video,
    packet_timeline,
    probe,
)
from osp.files import file_digest

# What PyAV and libav raise on files that nobody should have made; a programming error (TypeError, ...) is not among it.
BAD_FILE = (ClipError, av.FFmpegError, OSError, ValueError, ArithmeticError, RuntimeError, MemoryError)

_IMAGE_SUFFIX: Mapping[str, str] = {"jpeg": "jpg", "mpo": "jpg", "png": "png", "webp": "webp"}


@dataclass(frozen=True)
class Clip:
    """A clip that decodes: the bytes of its file, and what they hold."""

    data: bytes
    suffix: str  # of the file, without the dot
    info: VideoInfo
    start: float  # seconds in the source


@dataclass(frozen=True)
class Piece:
    """A run of frames of a source that is to be a clip."""

    first: int  # index of its first frame, in the order of showing
    frames: int
    start: float  # seconds after the source's first frame
    begin: int | None  # pts of the first frame; None in sources whose packets have no usable timestamps
    keyframe: int | None  # pts of the last clean keyframe up to `begin`
    copied: bool  # whether copying packets can make it


@dataclass(frozen=True)
class Examined:
    """What a source gives: the one clip that it is, or the pieces to cut, or neither and the reason why."""

    sha256: str
    clip: Clip | None = None
    pieces: tuple[Piece, ...] = ()
    reason: str = ""
    unchanged: bool = False


def examine(path: Path, clip_seconds: float, min_frames: int, known_sha256: str = "") -> Examined:
    """Reads a source: a whole clip at once where it is one, else the plan of its pieces. Never raises for a bad file.

    A source whose content is `known_sha256` is `unchanged` and not decoded.
    """
    sha256 = ""
    try:
        sha256 = file_digest(path)
        if sha256 == known_sha256:
            return Examined(sha256, unchanged=True)
        if is_image(path, path.name):
            return Examined(sha256, clip=_image(path))
        with open_video(path, path.name) as (container, _):
            timed = _muxer(container.format.name, path) is not None
        timeline = packet_timeline(path, path.name) if timed else None
        times = decoded_times(path, path.name) if timeline is None else timeline.times
        if len(times) < min_frames:
            raise ClipError(path.name, f"too short: {len(times)} frames, min_frames={min_frames}")
        pieces = plan(times, timeline, clip_seconds, min_frames)
        if len(pieces) > 1:
            return Examined(sha256, pieces=tuple(pieces))
        data = path.read_bytes()
        info = probe(data, path.name, decode=True, threads=1)
        if info.frames < min_frames:
            raise ClipError(path.name, f"too short: {info.frames} frames, min_frames={min_frames}")
        suffix = path.suffix.lower().removeprefix(".")
        return Examined(sha256, clip=Clip(data, "mp4" if suffix == "m4v" else suffix, info, 0.0))
    except BAD_FILE as error:
        return Examined(sha256, reason=_reason(error))


def extract(path: Path, piece: Piece) -> Clip | str:
    """Cuts one piece and decodes all of it; the reason, as text, where it cannot be had undamaged."""
    try:
        if piece.copied:
            clip = _copied(path, piece)
            if clip is not None:
                return clip
        return _encoded(path, piece)
    except BAD_FILE as error:
        return _reason(error)


def plan(times: Sequence[float], timeline: Timeline | None, clip_seconds: float, min_frames: int) -> list[Piece]:
    """Where to cut: pieces of at most `clip_seconds`, one after the other, that miss no frame.

    A cut goes to the last clean keyframe that leaves half of `clip_seconds` at least. Where there is none the piece is
    as long as it may be, and the next one, which then begins without a keyframe, cannot be copied. A rest of less than
    `min_frames` stays with the last piece.
    """
    count = len(times)
    # The same comparison with the frame that would follow the last one tells whether there is a rest.
    ends = [*times, times[-1] + (times[-1] / (count - 1) if count > 1 else 0.0)]
    keys = [0] if timeline is None else [i for i in range(count) if timeline.keys[i] and timeline.clean[i]]
    cuts = [0]
    while True:
        first = cuts[-1]
        # A little slack: 10 s of 30 fps are 300 frames, whatever the rounding of their timestamps (1 ms in Matroska).
        last = bisect.bisect_right(ends, times[first] + clip_seconds + 2e-3) - 1
        last = max(last, first + min_frames)
        if count - last < min_frames:
            break
        nearest = max((key for key in keys if key <= last), default=0)
        if times[nearest] >= times[first] + clip_seconds / 2 and nearest - first >= min_frames:
            last = nearest
        elif timeline is not None:
            # Copying the packets up to here is possible only where no later frame lies among them.
            while last > first + min_frames and not timeline.clean[last]:
                last -= 1
        cuts.append(last)
    cuts.append(count)
    pieces = []
    for first, end in pairwise(cuts):
        begin = keyframe = None
        copied = False
        if timeline is not None:
            begin = timeline.pts[first]
            key = keys[max(bisect.bisect_right(keys, first) - 1, 0)] if keys else 0
            keyframe = timeline.pts[key]
            copied = key == first and (end == count or timeline.clean[end])
        pieces.append(Piece(first, end - first, times[first], begin, keyframe, copied))
    return pieces


def _reason(error: Exception) -> str:
    if isinstance(error, ClipError):
        return error.reason
    return f"cannot be read ({getattr(error, 'strerror', None) or error or type(error).__name__})"


def _image(path: Path) -> Clip:
    """An image as it is; kinds that WebDataset readers do not know (BMP) become PNG."""
    data = path.read_bytes()
    info = probe(data, path.name, decode=True)
    suffix = _IMAGE_SUFFIX.get(info.codec)
    if suffix is None:
        file = io.BytesIO()
        with Image.open(io.BytesIO(data)) as image:
            image.convert("RGB").save(file, "png")
        data, suffix = file.getvalue(), "png"
    return Clip(data, suffix, info, 0.0)


def _muxer(demuxer: str, path: Path) -> str | None:
    """The muxer that packets of this container are copied into; None where timestamps are too poor for that."""
    if demuxer.startswith("mov,"):
        return "mov" if path.suffix.lower() == ".mov" else "mp4"
    if demuxer.startswith("matroska,"):
        return "webm" if path.suffix.lower() == ".webm" else "matroska"
    return None


def _copied(path: Path, piece: Piece) -> Clip | None:
    """The piece by its packets; None if what comes out is not what the source shows."""
    first_picture = next((picture for _, picture in _pictures(path, replace(piece, frames=1))), None)
    file = io.BytesIO()
    with open_video(path, path.name) as (container, stream):
        muxer = _muxer(container.format.name, path)
        try:
            container.seek(piece.begin or 0, stream=stream)
            with av.open(file, "w", format=muxer, options={"fflags": "+bitexact"}) as output:
                target = output.add_stream_from_template(stream, opaque=True)  # not every decoder has an encoder
                for packet in _piece_packets(container, stream, piece):
                    packet.stream = target
                    output.mux(packet)
        except (av.FFmpegError, ValueError):
            return None  # a codec that this muxer does not take, or timestamps out of order
    try:
        data = file.getvalue()
        info = probe(data, path.name, decode=True, threads=1)
        with open_video(data, path.name) as (container, stream):
            frame, _ = next(decoded_frames(container, stream, path.name))
            picture = frame_pixels(frame, None, VideoReformatter(), path.name)
    except ClipError:
        return None
    # The same picture means that the decoder's configuration, the colour tags and the rotation came along.
    if info.frames != piece.frames or first_picture is None or not np.array_equal(picture, first_picture):
        return None
    return Clip(data, "mkv" if muxer == "matroska" else muxer or "", info, piece.start)


def _piece_packets(
    container: av.container.InputContainer, stream: av.VideoStream, piece: Piece
) -> list["av.Packet[av.VideoStream]"]:
    """The packets of the piece, in coded order, with timestamps that count from its beginning."""
    packets: list[av.Packet[av.VideoStream]] = []
    for packet in container.demux(stream):
        if packet.size and not packet.is_discard and (packets or packet.pts == piece.begin):
            packets.append(packet)
            if len(packets) == piece.frames:
                break
    shown = [(packet.pts or 0) - (piece.begin or 0) for packet in packets]
    # Decoding times anew, as Matroska does not store them: the times of showing, early enough for every packet.
    delay = max((at - own for at, own in zip(sorted(shown), shown, strict=True)), default=0)
    for packet, own, at in zip(packets, shown, sorted(shown), strict=True):
        packet.pts, packet.dts = own, at - delay
    return packets


def _encoded(path: Path, piece: Piece) -> Clip:
    """The piece as H.264, near transparent (lossless for a GIF, whose dither 4:2:0 would blur); rotation is applied."""
    with open_video(path, path.name) as (container, stream):
        lossless = container.format.name == "gif"
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        time_base = stream.time_base if piece.begin is not None and stream.time_base else 1 / rate
    data = encode_pictures(_pictures(path, piece), rate, time_base, lossless=lossless, threads=1)
    info = probe(data, path.name, decode=True, threads=1)
    return Clip(data, "mp4", info, piece.start)


def _pictures(path: Path, piece: Piece) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """(Timestamp from the piece's beginning, `H W C`) of each of its frames; ClipError unless all of them decode."""
    count, reformatter = 0, VideoReformatter()
    with open_video(path, path.name) as (container, stream):
        if piece.keyframe is not None and piece.first > 0:
            container.seek(piece.keyframe, stream=stream)
        for index, (frame, _) in enumerate(decoded_frames(container, stream, path.name)):
            at = index - piece.first if piece.begin is None else (frame.pts or 0) - piece.begin
            if at < 0:
                continue
            if (at > 0 and count == 0) or frame.is_corrupt:
                break
            yield at, frame_pixels(frame, None, reformatter, path.name)
            count += 1
            if count == piece.frames:
                return
    raise ClipError(path.name, f"damaged, only {count} of {piece.frames} frames decode")
