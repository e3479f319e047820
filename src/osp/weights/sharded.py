"""Tensors in a folder, in pieces that several processes have written, each into a file of its own.

`rank-00000.safetensors` and so on hold rows of tensors as `KEY@FIRST_ROW`. `index.json` is written last: it has the
shape of each tensor, the size of each file, the checksum of each piece, and plain values. Whoever reads the folder may
be any number of processes: rows are read from whatever pieces they lie in, and a piece that is read is compared with
its checksum.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from osp.documents import COUNT, SIZE, printable, read_json
from osp.errors import DataError
from osp.files import write_json, write_whole
from osp.weights.files import DTYPES, WeightImportError, checksum, open_checkpoint, save_weights
from osp.weights.folders import SEAL, sealed
from osp.weights.lazy import Stored, Weights

INDEX = "index.json"
_FORMAT = "osp sharded tensors 1"
_PIECE = 64 << 20  # bytes at most: whoever reads one row reads its piece, to compare the checksum
_LARGEST_INDEX = 1 << 30  # bytes
_FILE = re.compile(r"rank-\d{5}\.safetensors")
_FILE_FORM = {
    "bytes": SIZE,
    "tensors": {...: {"dtype": str, "shape": [COUNT]}},
    "pieces": {...: {"rows": SIZE, "crc32": str}},
}
_FORM = {"format": str, "files": {...: _FILE_FORM}, "entries": dict, SEAL: str}


@dataclass(frozen=True)
class Piece:
    """The rows of a tensor from `begin` on; `shape` is that of the whole tensor."""

    key: str
    value: Stored
    shape: tuple[int, ...]
    begin: int = 0


@dataclass(frozen=True)
class Sharded:
    """The content of a folder: tensors, which are read when they are asked for, and plain values."""

    folder: Path
    weights: Weights
    entries: dict[str, Any]


def write_shard(folder: Path, rank: int, pieces: Iterable[Piece]) -> None:
    """Write the pieces of one process, one after another, and a file beside them that tells `write_index` of them."""
    listed = list(pieces)
    name = _shard(rank)
    cut = {f"{one.key}@{begin}": value for one in listed for begin, value in _cut(one)}
    checksums = save_weights(folder / name, Weights(cut), finite=False)
    about = {
        "bytes": (folder / name).stat().st_size,
        "tensors": {one.key: {"dtype": _name(one.value.dtype), "shape": list(one.shape)} for one in listed},
        "pieces": {key: {"rows": _rows(value.shape), "crc32": checksums[key]} for key, value in cut.items()},
    }
    write_json(_about(folder, rank), about)


def shards_missing(folder: Path, ranks: int) -> list[int]:
    """The processes among so many whose pieces are not written yet."""
    return [rank for rank in range(ranks) if not _about(folder, rank).exists()]


def write_index(folder: Path, ranks: int, entries: Mapping[str, Any]) -> None:
    """Make the folder complete, once so many processes have written their pieces. `entries` are plain values.

    Raises WeightImportError if the pieces do not make whole tensors.
    """
    files = {_shard(rank): read_json(_about(folder, rank), _FILE_FORM, _LARGEST_INDEX) for rank in range(ranks)}
    _tensors(folder, files)
    index = sealed({"format": _FORMAT, "files": files, "entries": dict(entries)})
    write_whole(folder / INDEX, json.dumps(index, allow_nan=False, separators=(",", ":")))
    for rank in range(ranks):
        _about(folder, rank).unlink()


def open_sharded(folder: Path) -> Sharded:
    """The content of the folder. Raises WeightImportError naming what is gone, cut or changed."""
    if not (folder / INDEX).exists():
        raise WeightImportError(f"{folder}: has no {INDEX}, so it was not written to its end, or is no checkpoint")
    try:
        index = read_json(folder / INDEX, _FORM, _LARGEST_INDEX)
    except DataError as error:
        raise WeightImportError(str(error)) from error
    unsealed = {key: value for key, value in index.items() if key != SEAL}
    if index["format"] != _FORMAT or sealed(unsealed)[SEAL] != index[SEAL]:
        raise WeightImportError(f"{folder / INDEX}: is not what was written; copy the folder again, or take another")
    for name, about in index["files"].items():
        _check_file(folder / name, about["bytes"])
    return Sharded(folder, _tensors(folder, index["files"]), index["entries"])


def _check_file(path: Path, size: int) -> None:
    if not _FILE.fullmatch(path.name):
        raise WeightImportError(f"{path.parent / INDEX}: names {printable(path.name)[:60]}, which is no file of pieces")
    if not path.is_file():
        raise WeightImportError(f"{path}: is gone, and the checkpoint is not whole without it; take another")
    if (found := path.stat().st_size) != size:
        raise WeightImportError(f"{path}: has {found} bytes, not {size}; it was cut short or changed: take another")


def _cut(piece: Piece) -> Iterator[tuple[int, Stored]]:
    """A piece in rows of at most so many bytes, each with the number of its first row."""
    shape, dtype = piece.value.shape, piece.value.dtype
    if not shape:
        yield piece.begin, piece.value
        return
    step = max(1, _PIECE // max(1, math.prod(shape[1:]) * dtype.itemsize))
    for begin in range(0, shape[0], step):
        end = min(shape[0], begin + step)
        yield piece.begin + begin, Stored((end - begin, *shape[1:]), dtype, partial(piece.value.rows, begin, end))


def _rows(shape: tuple[int, ...]) -> int:
    return shape[0] if shape else 1


def _name(dtype: torch.dtype) -> str:
    return next(name for name, one in DTYPES.items() if one == dtype)


def _shard(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _about(folder: Path, rank: int) -> Path:
    return folder / f"{_shard(rank)}.json"


@dataclass(frozen=True, order=True)
class _Place:
    """Where some rows of a tensor lie."""

    begin: int
    end: int
    file: str
    key: str
    crc32: str


class _Rows:
    """The rows of a tensor, in pieces that follow one another."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, files: "_Files") -> None:
        self.shape, self.dtype = shape, dtype
        self.pieces: list[_Place] = []
        self._files = files

    def is_whole(self) -> bool:
        """Whether the pieces, in order, are all rows, each once."""
        self.pieces.sort()
        joints = [(0, 0), *((one.begin, one.end) for one in self.pieces)]
        follow = all(before[1] == after[0] for before, after in pairwise(joints))
        return follow and joints[-1][1] == _rows(self.shape)

    def read(self) -> Tensor:
        """All of it."""
        return self.part(0, _rows(self.shape)).reshape(self.shape)

    def part(self, begin: int, end: int) -> Tensor:
        """Some rows, in memory of their own."""
        rest = self.shape[1:]
        found = torch.empty(max(0, end - begin), *rest, dtype=self.dtype, device="cpu")
        for one in self.pieces:
            if one.begin < end and begin < one.end:
                rows = self._files.read(one, (one.end - one.begin, *rest), self.dtype)
                first, last = max(begin, one.begin), min(end, one.end)
                found[first - begin : last - begin] = rows[first - one.begin : last - one.begin]
        return found

    def stored(self) -> Stored:
        """The tensor, to be read."""
        return Stored(self.shape, self.dtype, self.read, self.part)


class _Files:
    """The files of a folder, opened when they are first needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._opened: dict[str, Weights] = {}

    def read(self, place: _Place, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The rows of a piece. Raises WeightImportError if they are not what was written."""
        file, shown = self._folder / place.file, printable(place.key)[:200]
        if place.file not in self._opened:
            self._opened[place.file] = Weights.of(open_checkpoint(file))
        stored = self._opened[place.file].stored.get(place.key)
        if stored is None or stored.dtype != dtype or (stored.shape or (1,)) != shape:
            raise WeightImportError(f"{file}: {shown} is not what the index says")
        value = stored.read()
        if checksum(value) != place.crc32:
            raise WeightImportError(
                f"{file}: {shown} is not what was written; its checksum is another. Copy the folder again, or take "
                "another checkpoint"
            )
        return value.reshape(shape)


def _tensors(folder: Path, about: Mapping[str, Any]) -> Weights:
    """The tensors of all files. Raises WeightImportError if their pieces are not whole tensors."""
    files, found = _Files(folder), dict[str, _Rows]()
    for one in about.values():
        for key, tensor in one["tensors"].items():
            shape, dtype = tuple(tensor["shape"]), DTYPES.get(tensor["dtype"])
            rows = found.setdefault(key, _Rows(shape, dtype or torch.float32, files))
            if dtype is None or (rows.shape, rows.dtype) != (shape, dtype):
                raise WeightImportError(f"{folder / INDEX}: {printable(key)[:200]} is of two kinds")
    for name, one in about.items():
        for place, piece in one["pieces"].items():
            key, _, begin = place.rpartition("@")
            if key not in found or not re.fullmatch(r"\d{1,18}", begin):
                raise WeightImportError(f"{folder / INDEX}: {printable(place)[:200]} is a piece of no tensor")
            end = int(begin) + piece["rows"]
            found[key].pieces.append(_Place(int(begin), end, name, place, piece["crc32"]))
    for key, rows in found.items():
        if not rows.is_whole():
            raise WeightImportError(
                f"{folder}: {printable(key)[:200]} is not whole; pieces of it are missing or double"
            )
    return Weights({key: rows.stored() for key, rows in found.items()})
