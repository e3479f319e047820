"""The promises of headers, compared with the limits and with what the file can hold, before FFmpeg opens it.

Of MP4 and QuickTime FFmpeg builds a table of all samples before it reads the first, as long as the header says. A
sample has a byte at least, so that a file promises no more samples than it has bytes.
"""

import io
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from osp.data.media.errors import ClipError
from osp.data.media.limits import Limits

_HOLDERS = frozenset({b"moov", b"trak", b"mdia", b"minf", b"stbl", b"edts", b"moof", b"traf"})
_TABLES = frozenset({b"stsz", b"stz2", b"stts", b"ctts", b"elst", b"trun"})
_DEEPEST = 8  # boxes within boxes; the tables lie at the fifth
_MOST_BOXES = 1 << 20
_MOST_EDITED = 16  # samples that edit lists may repeat, by `Limits.frames`


class _Box(NamedTuple):
    kind: bytes
    start: int  # of the content
    end: int


def check_headers(source: Path | bytes, name: str, limits: Limits) -> None:
    """Raise ClipError for a GIF or AVI of too large frames, and for an MP4 that promises more than it can hold.

    FFmpeg itself checks the frames of other files against the limit that it is given.
    """
    try:
        with open(source, "rb") if isinstance(source, Path) else io.BytesIO(source) as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            head = file.read(72)
            if head[:3] == b"GIF" and len(head) >= 10:
                width, height = struct.unpack("<HH", head[6:10])
                limits.check_pixels(name, width, height, "its canvas is")
            if head[:4] == b"RIFF" and head[8:12] == b"AVI " and head[24:28] == b"avih" and len(head) == 72:
                width, height = struct.unpack("<II", head[64:72])
                limits.check_pixels(name, width, height)
            if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp", b"moof"):
                _check_tables(file, size, name, limits)
    except OSError as error:
        raise ClipError(name, f"cannot be opened ({error.strerror})") from error


def _check_tables(file: BinaryIO, size: int, name: str, limits: Limits) -> None:
    samples, edits = 1, 0
    for box in _boxes(file, 0, size):
        if box.kind == b"trak":
            samples, edits = 1, 0
        if box.kind not in _TABLES or box.end - box.start < 8:
            continue
        file.seek(box.start)
        head = file.read(12)
        if box.kind in (b"stsz", b"stz2"):
            promised = int.from_bytes(head[8:12], "big")
            samples = promised
        elif box.kind == b"trun":
            promised = int.from_bytes(head[4:8], "big")
        elif box.kind == b"elst":
            edits = min(int.from_bytes(head[4:8], "big"), (box.end - box.start - 8) // 12)
            promised = 0
        else:
            promised = _run_lengths(file, box)
        if promised > size:
            raise ClipError(name, f"promises {promised} samples, more than it has bytes ({size})")
        if edits > 1 and edits * samples > _MOST_EDITED * limits.frames:
            raise ClipError(
                name,
                f"repeats its {samples} samples in {edits} edits, "
                f"more than {_MOST_EDITED} times limits.frames={limits.frames}; raise that setting to read it",
            )


def _run_lengths(file: BinaryIO, box: _Box) -> int:
    """The sum of the first numbers of the pairs in a table of runs."""
    file.seek(box.start + 4)
    entries = min(int.from_bytes(file.read(4), "big"), (box.end - box.start - 8) // 8)
    table = file.read(entries * 8)
    return sum(count for count, _ in struct.iter_unpack(">II", table[: len(table) // 8 * 8]))


def _boxes(file: BinaryIO, start: int, end: int, depth: int = 0) -> Iterator[_Box]:
    """The boxes between two places, and those within the ones that hold tables; ends where the structure does."""
    count = 0
    while start + 8 <= end and count < _MOST_BOXES:
        count += 1
        file.seek(start)
        head = file.read(16)
        length, kind, content = int.from_bytes(head[:4], "big"), head[4:8], start + 8
        if length == 1:
            length, content = int.from_bytes(head[8:16], "big"), start + 16
        elif length == 0:
            length = end - start
        if length < content - start:
            return
        box = _Box(kind, content, min(start + length, end))
        yield box
        if kind in _HOLDERS and depth < _DEEPEST:
            yield from _boxes(file, box.start, box.end, depth + 1)
        start += length
