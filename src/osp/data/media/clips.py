"""Source file -> clips: where to cut it, the cut itself, and the check that every frame of a clip decodes.

Original bytes are kept where that is possible. A file short enough to be one clip is stored as it is. A longer one is
cut at keyframes by copying its packets; only pieces that have no keyframe to begin with are encoded anew, all those
between two keyframes from one decode.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from osp.data.media.container import ANIMATION, Movie, open_movie, packet_timeline
from osp.data.media.encode import encode_pictures
from osp.data.media.errors import ClipError, told
from osp.data.media.frames import Display
from osp.data.media.limits import DEFAULT_LIMITS, Limits
from osp.data.media.pieces import Cutter, Peekable, Piece, Shot, plan, sharing
from osp.data.media.stills import open_still
from osp.data.media.video import VideoInfo, is_still, probe
from osp.files import file_digest

# The errors of PyAV and libav for broken files; a programming error (TypeError, ...) is not among them.
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
class CutSettings:
    """How sources are cut: clips of at most `seconds` and at least `min_frames` frames."""

    seconds: float
    min_frames: int
    limits: Limits = DEFAULT_LIMITS


@dataclass(frozen=True)
class Examined:
    """The clips of a source: the one clip that it is, or the pieces to cut, or neither and the reason why.

    With `unplanned` the pieces are found while it is decoded, by `cut_decoded`. `note` is what a user should know of a
    source that is stored.
    """

    sha256: str
    clip: Clip | None = None
    pieces: tuple[Piece, ...] = ()
    unplanned: bool = False
    reason: str = ""
    note: str = ""
    unchanged: bool = False


def examine(path: Path, settings: CutSettings, known_sha256: str = "") -> Examined:
    """Reads a source: a whole clip at once where it is one, else the plan of its pieces. Never raises for a bad file.

    A source whose content is `known_sha256` is `unchanged` and not decoded.
    """
    sha256 = ""
    try:
        sha256 = file_digest(path)
        if sha256 == known_sha256:
            return Examined(sha256, unchanged=True)
        if is_still(path, path.name, settings.limits):
            return Examined(sha256, clip=_image(path, settings.limits))
        return _examined_movie(path, settings, sha256)
    except BAD_FILE as error:
        return Examined(sha256, reason=_reason(error))


def examine_whole(path: Path, limits: Limits, known_sha256: str = "") -> Examined:
    """Reads a source that stays one file, however long it is: a clip without its bytes. Never raises for a bad file.

    The clip of an image has its bytes, which need not be those of the file. Else as `examine`.
    """
    sha256 = ""
    try:
        sha256 = file_digest(path)
        if sha256 == known_sha256:
            return Examined(sha256, unchanged=True)
        if is_still(path, path.name, limits):
            return Examined(sha256, clip=_image(path, limits))
        limits.check_bytes(path.name, path.stat().st_size)
        info = probe(path, path.name, decode=True, threads=1, limits=limits)
        return Examined(sha256, clip=Clip(b"", _suffix(path), info, 0.0))
    except BAD_FILE as error:
        return Examined(sha256, reason=_reason(error))


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower().removeprefix(".")
    return "mp4" if suffix == "m4v" else suffix


def _examined_movie(path: Path, settings: CutSettings, sha256: str) -> Examined:
    limits = settings.limits
    with open_movie(path, path.name, limits=limits) as movie:
        form = movie.form
        note = f"pixels of {movie.odd_aspect} cannot be meant, read as square" if movie.odd_aspect else ""
    # The timeline is read in any case: it shows without decoding that frames or seconds exceed the limits.
    timeline = packet_timeline(path, path.name, limits)
    if form == ANIMATION or timeline is None or _muxer(form, path) is None:
        if form == ANIMATION or _is_long(path, settings):
            return Examined(sha256, unplanned=True, note=note)
    else:
        _check_length(path, len(timeline.times), settings)
        pieces = plan(timeline, settings.seconds, settings.min_frames)
        if len(pieces) > 1:
            return Examined(sha256, pieces=tuple(pieces), note=note)
    limits.check_bytes(path.name, path.stat().st_size)
    data = path.read_bytes()
    info = probe(data, path.name, decode=True, threads=1, limits=limits)
    _check_length(path, info.frames, settings)
    return Examined(sha256, clip=Clip(data, _suffix(path), info, 0.0), note=note)


def _check_length(path: Path, frames: int, settings: CutSettings) -> None:
    if frames < settings.min_frames:
        raise ClipError(path.name, f"too short: {frames} frames, min_frames={settings.min_frames}")


def clips_of(path: Path, examined: Examined, settings: CutSettings, after: int = 0) -> Iterator[Clip | str]:
    """Each clip of a source in its order, from number `after` on; the reason, as text, for one that cannot be had."""
    if examined.clip is not None:
        yield examined.clip
    elif examined.unplanned:
        yield from cut_decoded(path, settings, after)
    for run in sharing(examined.pieces[after:]):
        yield from extract(path, run, settings.limits)


def extract(path: Path, pieces: Sequence[Piece], limits: Limits = DEFAULT_LIMITS) -> Iterator[Clip | str]:
    """The clips of pieces that `sharing` put together, one by one; the reason, as text, for one that cannot be had."""
    if len(pieces) == 1 and pieces[0].copied:
        clip: Clip | str | None = None
        try:
            clip = _copied(path, pieces[0], limits)
        except BAD_FILE as error:
            clip = _reason(error)
        if clip is not None:
            yield clip
            return
    yield from _encoded(path, pieces, limits)


def _reason(error: Exception) -> str:
    return error.reason if isinstance(error, ClipError) else f"cannot be read ({told(error)})"


def _image(path: Path, limits: Limits) -> Clip:
    """An image as it is; kinds that WebDataset readers do not know (BMP, TIFF, ...) become PNG."""
    limits.check_bytes(path.name, path.stat().st_size)
    data = path.read_bytes()
    info = probe(data, path.name, decode=True, limits=limits)
    suffix = _IMAGE_SUFFIX.get(info.codec)
    if suffix is None:
        file = io.BytesIO()
        open_still(data, path.name, limits)[0].save(file, "png")
        data, suffix = file.getvalue(), "png"
    return Clip(data, suffix, info, 0.0)


# --- copied packets ---------------------------------------------------------------------------------------------------


def _muxer(demuxer: str, path: Path) -> str | None:
    """The muxer that packets of this container are copied into; None where timestamps are too poor for that."""
    if demuxer.startswith("mov,"):
        return "mov" if path.suffix.lower() == ".mov" else "mp4"
    if demuxer.startswith("matroska,"):
        return "webm" if path.suffix.lower() == ".webm" else "matroska"
    return None


def _copied(path: Path, piece: Piece, limits: Limits) -> Clip | None:
    """The piece by its packets; None if what comes out is not what the source shows."""
    with open_movie(path, path.name, limits=limits) as movie:
        first_picture = next(_piece_pictures(movie, _begin(movie, piece), piece), None)
    file = io.BytesIO()
    with open_movie(path, path.name, limits=limits) as movie:
        muxer, stream = _muxer(movie.form, path), movie.stream
        if stream is None:
            return None
        try:
            movie.seek(piece.begin)
            with av.open(file, "w", format=muxer, options={"fflags": "+bitexact"}) as output:
                target = output.add_stream_from_template(stream, opaque=True)  # not every decoder has an encoder
                for packet in _piece_packets(movie, piece):
                    packet.stream = target
                    output.mux(packet)
        except (av.FFmpegError, ValueError):
            return None  # a codec that this muxer does not take, or timestamps out of order
    try:
        data = file.getvalue()
        info = probe(data, path.name, decode=True, threads=1, limits=limits)
        with open_movie(data, path.name, limits=limits) as movie:
            frame, _ = next(movie.frames())
            picture = Display(path.name, movie.aspect, limits=limits).pixels(frame)
    except ClipError:
        return None
    # The same picture means that the decoder's configuration, the colour tags and the rotation came along.
    if info.frames != piece.frames or first_picture is None or not np.array_equal(picture, first_picture[1]):
        return None
    return Clip(data, "mkv" if muxer == "matroska" else muxer or "", info, piece.start)


def _piece_packets(movie: Movie, piece: Piece) -> list["av.Packet[av.VideoStream]"]:
    """The packets of the piece, in coded order, with timestamps that count from its beginning."""
    packets: list[av.Packet[av.VideoStream]] = []
    for packet in movie.packets():
        if packets or packet.pts == piece.begin:
            packets.append(packet)
            if len(packets) == piece.frames:
                break
    shown = [(packet.pts or 0) - piece.begin for packet in packets]
    # Decoding times anew, as Matroska does not store them: the times of showing, early enough for every packet.
    delay = max((at - own for at, own in zip(sorted(shown), shown, strict=True)), default=0)
    for packet, own, at in zip(packets, shown, sorted(shown), strict=True):
        packet.pts, packet.dts = own, at - delay
    return packets


# --- encoded anew -----------------------------------------------------------------------------------------------------


def _shots(movie: Movie) -> Iterator[Shot]:
    """The frames from here on. Damage lasts until the next keyframe: the decoder does not mark what leans on it."""
    damaged = False
    for frame, time in movie.frames(damaged=True):
        damaged = frame.is_corrupt or (damaged and not frame.key_frame)
        yield Shot(frame, time, damaged)


def _encoded(path: Path, pieces: Sequence[Piece], limits: Limits) -> Iterator[Clip | str]:
    """Pieces that follow each other, encoded anew from one decode."""
    done, reason = 0, ""
    try:
        with open_movie(path, path.name, limits=limits) as movie:
            shots = _begin(movie, pieces[0])
            for piece in pieces:
                yield _encode(movie, piece.start, _piece_pictures(movie, shots, piece), movie.time_base)
                done += 1
    except BAD_FILE as error:
        reason = _reason(error)
    for _ in pieces[done:]:
        yield reason


def _begin(movie: Movie, piece: Piece) -> Peekable:
    if piece.first > 0:
        movie.seek(piece.keyframe)
    return Peekable(_shots(movie))


def _encode(
    movie: Movie, start: float, pictures: Iterator[tuple[int, NDArray[np.uint8]]], time_base: Fraction | None
) -> Clip | str:
    """H.264 of pictures with timestamps, near transparent; lossless for a GIF, whose dither 4:2:0 would blur."""
    lossless = movie.form in ("gif", ANIMATION)
    try:
        data = encode_pictures(pictures, movie.rate, time_base or 1 / movie.rate, lossless=lossless, threads=1)
        # Only the first frame of the encoded clip is decoded again.
        return Clip(data, "mp4", probe(data, movie.name, threads=1, limits=movie.limits), start)
    except BAD_FILE as error:
        return _reason(error)


def _piece_pictures(movie: Movie, shots: Peekable, piece: Piece) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """(Timestamp from the piece's beginning, `H W C`) of each of its frames; ClipError unless all of them decode."""
    count, display = 0, Display(movie.name, movie.aspect, limits=movie.limits)
    while (shot := shots.peek()) is not None:
        at = (shot.frame.pts or 0) - piece.begin
        if at > 0 and count == 0:
            break  # it may belong to the next piece
        shots.next()
        if at < 0:
            continue
        if shot.damaged:
            break
        yield at, display.pixels(shot.frame)
        count += 1
        if count == piece.frames:
            return
    raise ClipError(movie.name, f"damaged, only {count} of {piece.frames} frames decode")


# --- cut while it is decoded ------------------------------------------------------------------------------------------


def cut_decoded(path: Path, settings: CutSettings, after: int = 0) -> Iterator[Clip | str]:
    """The clips of a source whose packets do not tell its frames, from one decode; the first `after` are passed over.

    A reason, as text, stands for a clip that cannot be had; after damage that ends the decode it is the last.
    """
    try:
        even = _goes_back(path, settings.limits)
        with open_movie(path, path.name, limits=settings.limits) as movie:
            cutter = Cutter(_in_order(movie, even), settings.seconds, settings.min_frames)
            for number, (start, shots) in enumerate(cutter.pieces()):
                if number >= after:
                    # Only for animations it is known that a player keeps to these times.
                    time_base = movie.time_base if movie.form == ANIMATION else None
                    yield _encode(movie, start, _shot_pictures(movie, shots, time_base), time_base)
    except BAD_FILE as error:
        yield _reason(error)


def _is_long(path: Path, settings: CutSettings) -> bool:
    """Whether there is more of a source than one piece; no more of it is decoded than tells that."""
    even = _goes_back(path, settings.limits)
    with open_movie(path, path.name, limits=settings.limits) as movie:
        pieces = Cutter(_in_order(movie, even), settings.seconds, settings.min_frames).pieces()
        return next(pieces, None) is not None and next(pieces, None) is not None


def _goes_back(path: Path, limits: Limits) -> bool:
    """Whether the timestamps of a file cannot be those of its frames, as where two recordings were put together."""
    with open_movie(path, path.name, limits=limits) as movie:
        stamps = [packet.dts for packet in movie.packets()]
    return any(a is None or b is None or b <= a for a, b in pairwise(stamps))


def _in_order(movie: Movie, even: bool) -> Iterator[Shot]:
    """The frames with times that go up: `even` spreads them by the rate, as does a timestamp that goes back."""
    last = -1.0
    for number, shot in enumerate(_shots(movie)):
        time = float(number / movie.rate) if even else shot.time
        last = time if time > last else last + float(1 / movie.rate)
        yield shot._replace(time=last)


def _shot_pictures(
    movie: Movie, shots: Iterator[Shot], time_base: Fraction | None
) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """(Timestamp from the first, `H W C`) of a piece's frames: their own in `time_base`, else their numbers."""
    display, begin = Display(movie.name, movie.aspect, limits=movie.limits), 0
    for number, shot in enumerate(shots):
        if shot.damaged:
            raise ClipError(movie.name, f"damaged, only {number} frames of it decode")
        begin = begin if number else shot.frame.pts or 0
        yield number if time_base is None else (shot.frame.pts or 0) - begin, display.pixels(shot.frame)
