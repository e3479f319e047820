"""`ClipEntry`, a clip's place in a tar and its record; the declared form of listings and records."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from osp.data.media.limits import DEFAULT_LIMITS, Limits
from osp.data.media.part import WHOLE, Part
from osp.documents import COUNT, DocumentError, check_form
from osp.errors import DataError, OspError

MEND = "copy the shard again, or write the folder anew with the command that made it"

RECORD_FORM: Mapping[str, Any] = {
    "frames": int,
    "fps": float,
    "width": int,
    "height": int,
    "duration": float,
    "caption": str,
    "captions": [str],
    "source": str,
    "start": float,
    "kind": str,
    "scores": {...: float},
}
"""Types of the keys of a record, any of which may be missing, and others may be there."""

PART_FORM: Mapping[Any, Any] = {"cut?": [COUNT], "crop?": [COUNT], "recaptioned?": bool}
"""Further keys of a record, which count only where `osp shards` wrote them: others may call other things so."""

LINE_FORM: Mapping[Any, Any] = {
    "key": str,
    "member": str,
    "offset": int,
    "size": int,
    "crc32?": int,
    **{f"{key}?": form for key, form in RECORD_FORM.items()},
    **PART_FORM,
}
"""A line of a shard's listing: a clip's place in the tar, and its record."""

_LARGEST: Mapping[str, float] = {
    "frames": 1 << 31,
    "width": 1 << 16,
    "height": 1 << 16,
    "fps": 1e6,
    "duration": 1e9,
    "start": 1e9,
    "offset": 1 << 62,
    "size": 1 << 62,
}
_KINDS = ("video", "image")


class ShardGoneError(OspError):
    """A shard that cannot be opened: what reads it ends, since all its clips must not be replaced in silence."""


@dataclass(frozen=True)
class ClipEntry:
    """One sample of a shard folder: where its media bytes lie, and its record.

    Without a `member`, `tar` is the media file itself. Without a `crc32` the bytes are not checked.
    """

    key: str
    tar: Path
    member: str
    offset: int  # of the media member's data in the tar, bytes
    size: int  # bytes
    record: Mapping[str, Any]
    crc32: int | None = None
    part: Part = WHOLE  # that the clip is of the media file

    def source(self) -> Path | bytes:
        """The bytes or the file that `osp.data.media.video` reads the clip from. Raises as `read`."""
        return self.read() if self.member else self.tar

    def read(self) -> bytes:
        """The media file's bytes.

        Raises ShardGoneError if the tar cannot be opened, DataError if it ends too early, cannot be read there, or if
        the bytes are not those that were written.
        """
        try:
            with open(self.tar, "rb") as file:
                try:
                    return self.read_from(file)
                except OSError as error:
                    raise DataError(f"{self.tar}: cannot be read ({error.strerror}); {MEND}") from error
        except OSError as error:
            raise ShardGoneError(f"{self.tar}: cannot be opened ({error.strerror}); {MEND}") from error

    def read_from(self, file: BinaryIO) -> bytes:
        """The same out of the tar, which is open."""
        # A listing may claim any size: what the file does not hold is not allocated.
        held = file.seek(0, 2) - self.offset
        file.seek(self.offset)
        data = file.read(max(0, min(self.size, held)))
        if len(data) != self.size:
            raise DataError(f"{self.tar}: ends inside {self.member} ({len(data)} of {self.size} bytes); {MEND}")
        if self.crc32 is not None and zlib.crc32(data) != self.crc32:
            raise DataError(
                f"{self.tar}: the bytes of {self.member} are damaged, they are not those that were written; {MEND}"
            )
        return data


def listed_entry(tar: Path, line: dict[str, Any], place: str, limits: Limits = DEFAULT_LIMITS) -> ClipEntry:
    """The clip that a line of a shard's listing tells of. Raises DocumentError for a line that makes no sense."""
    check_form(line, LINE_FORM, place)
    for key in _LARGEST.keys() & line.keys():
        if not _is_plausible(key, line[key]):
            raise DocumentError(f"{place}: {key}={line[key]} is outside 0 to {_LARGEST[key]:g}")
    if line.get("kind", "video") not in _KINDS:
        raise DocumentError(f"{place}: kind must be video or image")
    if line["size"] > limits.member_bytes:
        raise DocumentError(f"{place}: size={line['size']} is more than limits.member_bytes={limits.member_bytes}")
    part = part_of(line, place)
    where = {name: line.pop(name) for name in ("key", "member", "offset", "size")}
    return ClipEntry(tar=tar, crc32=line.pop("crc32", None), record=line, part=part, **where)


def part_of(record: Mapping[str, Any], place: str) -> Part:
    """The part of its file that a clip is by its record. Raises DocumentError for one that makes no sense."""
    cut, crop = record.get("cut"), record.get("crop")
    if cut is not None and not (len(cut) == 2 and cut[0] < cut[1] <= _LARGEST["frames"]):
        raise DocumentError(f"{place}: cut={cut}: must be the first frame and a later one, after the last")
    if crop is not None and not (
        len(crop) == 4 and crop[0] < crop[1] <= _LARGEST["width"] and crop[2] < crop[3] <= _LARGEST["height"]
    ):
        raise DocumentError(f"{place}: crop={crop}: must be x0, x1, y0, y1 with x0 < x1 and y0 < y1")
    if cut is None and crop is None:
        return WHOLE
    return Part(
        None if cut is None else (cut[0], cut[1]), None if crop is None else (crop[0], crop[1], crop[2], crop[3])
    )


def part_facts(record: Mapping[str, Any], place: str) -> dict[str, Any]:
    """The keys of `PART_FORM` that a record has. Raises DocumentError for values that make no sense."""
    facts = {name: record[name] for key in PART_FORM if (name := key.rstrip("?")) in record}
    check_form(facts, PART_FORM, place)
    part_of(facts, place)
    return facts


def known_facts(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a foreign record that have the type and a size that ours have; the others are left out."""
    return {
        key: values[key] for key, form in RECORD_FORM.items() if key in values and _is_known(key, values[key], form)
    }


def _is_known(key: str, value: Any, form: Any) -> bool:
    try:
        check_form(value, form, key)
    except DocumentError:
        return False
    return _is_plausible(key, value) and (key != "kind" or value in _KINDS)


def _is_plausible(key: str, value: Any) -> bool:
    return key not in _LARGEST or 0 <= value <= _LARGEST[key]
