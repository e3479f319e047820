"""The members of a tar that anybody may have written: only headers are read, and no claim in them is believed.

Python's own reader allocates and skips what a header claims, ends in silence at a damaged header, and keeps every
member; this one compares each claim with the file, and says where the tar is damaged.
"""

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from osp.documents import MIB
from osp.errors import DataError

_BLOCK = tarfile.BLOCKSIZE
_MOST_EXTENDED = MIB  # of a long name or an extended header; both are some hundred bytes long
_LONG_NAME, _LONG_LINK = tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
_EXTENDED = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_WITHOUT_DATA = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)
_PAX = re.compile(rb"(\d{1,9}) ([^=\n]{1,200})=")


class TarDamageError(DataError):
    """A place in a tar from which on nothing can be read."""


@dataclass(frozen=True)
class Member:
    """One member of a tar; names that are not UTF-8 are as Python has them in file names."""

    name: str
    offset: int  # of its data, bytes
    size: int  # bytes
    kind: str  # "file", "folder", or "other" for what has no plain bytes: links, devices, files with holes


def read_members(file: BinaryIO) -> Iterator[Member]:
    """The members of a tar, in order; the file may be read at any place between two of them.

    Raises TarDamageError where a header makes no sense or claims more than the file holds.
    """
    length = file.seek(0, 2)
    offset, extended = 0, dict[str, str]()  # what headers before a member say of it
    while True:
        file.seek(offset)
        block = file.read(_BLOCK)
        if not block.strip(b"\0") and len(block) in (0, _BLOCK):
            if not block and not offset:
                raise TarDamageError("the file is empty")
            if file.read(MIB).strip(b"\0"):
                raise TarDamageError(f"an end mark at byte {offset}, and more behind it")
            return
        header = _header(block, offset)
        data, size = offset + _BLOCK, header.size
        if header.type in (_LONG_NAME, _LONG_LINK, tarfile.XGLTYPE, *_EXTENDED):
            if not 0 <= size <= _MOST_EXTENDED:
                raise TarDamageError(f"the header at byte {offset} claims a name of {size} bytes")
            extended |= _extended(header.type, file.read(size))
        else:
            size = int(extended.get("size", size))
            if header.type in _WITHOUT_DATA:
                size = 0
            data += _sparse_blocks(file, header, block)
            if not 0 <= size <= length - data:
                name = extended.get("path", header.name)
                raise TarDamageError(f"{name} claims {size} bytes, where the file has {max(0, length - data)}")
            yield _member(header, extended, data, size)
            extended = {}
        offset = data + -(-size // _BLOCK) * _BLOCK


def _header(block: bytes, offset: int) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError) as error:
        raise TarDamageError(f"no tar header at byte {offset} ({error})") from None


def _member(header: tarfile.TarInfo, extended: dict[str, str], data: int, size: int) -> Member:
    holes = any(key.startswith("GNU.sparse.") for key in extended)
    kind = "file" if header.type in _FILES and not holes else "folder" if header.type == tarfile.DIRTYPE else "other"
    return Member(extended.get("path", header.name), data, size, kind)


def _extended(kind: bytes, data: bytes) -> dict[str, str]:
    """The fields of a header before a member: `path`, `size`, and those that mark a file with holes."""
    if kind == _LONG_NAME:
        return {"path": data.split(b"\0")[0].decode("utf-8", "surrogateescape")}
    if kind not in _EXTENDED:
        return {}
    said, at = dict[str, str](), 0
    while match := _PAX.match(data, at):
        end = at + int(match[1])
        key, value = match[2].decode("latin-1"), data[match.end() : end - 1].decode("utf-8", "surrogateescape")
        if end <= match.end() or end > len(data) or (key == "size" and not re.fullmatch(r"[0-9]{1,20}", value)):
            break
        if key in ("path", "size") or key.startswith("GNU.sparse."):
            said[key] = value
        at = end
    if data[at:].strip(b"\0"):
        raise TarDamageError("an extended header makes no sense")
    return said


def _sparse_blocks(file: BinaryIO, header: tarfile.TarInfo, block: bytes) -> int:
    """Bytes of the further blocks of a file with holes in GNU's old format, between its header and its data."""
    count = 0
    more = header.type == tarfile.GNUTYPE_SPARSE and bool(block[482])
    while more:
        further = file.read(_BLOCK)
        count += len(further)
        more = len(further) == _BLOCK and bool(further[504])
    return count
