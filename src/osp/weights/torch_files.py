"""Torch files: an archive (zip) with a pickle and a member for each storage, or the one stream of before torch 1.6.

The pickle is read at once, by a machine that makes plain values only (`osp.weights.pickles`). Storages stay in the
mapped file until they are asked for; those of an archive are then compared with the checksum (CRC-32) that it holds.
"""

import io
import mmap
import struct
import zipfile
import zlib
from abc import abstractmethod
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from osp.weights.lazy import Opened, Stored
from osp.weights.pickled import Storage, View, torch_table
from osp.weights.pickles import read_pickle

_PICKLE = "data.pkl"
_MOST_PICKLE = 128 << 20  # bytes; 100,000 tensors with their names are about 30 MB
# Weights do not shrink to a twentieth; zeros shrink to a thousandth, and a small file would fill the memory.
_MOST_RATIO, _ANY_RATIO = 20, 64 << 20
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001


class Content(Opened):
    """The contents of a file, or of a mapping in it."""

    def __init__(self, values: Mapping[Any, Any], stored: Callable[[View], Stored]) -> None:
        self._values, self._stored = values, stored

    def peek(self, key: object) -> Any:
        """See `Opened.peek`."""
        value = self._values[key]
        if isinstance(value, View):
            return self._stored(value)
        if isinstance(value, dict) and holds_views(value):
            return Content(value, self._stored)
        return with_tensors(value, lambda view: self._stored(view).read())

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def open_torch(path: Path) -> "TorchFile":
    """The file, with everything read but its storages. Raises errors of many kinds for a file that is damaged."""
    with open(path, "rb") as file:
        is_archive = file.read(4) == b"PK\x03\x04"
        # The mapping copies on writing: a change to a tensor reaches neither the file nor other processes.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return Archive(path, mapped) if is_archive else Stream(mapped)


class TorchFile:
    """A torch file: its `value`, in which a `View` stands for a tensor."""

    value: Any

    def __init__(self, mapped: mmap.mmap) -> None:
        self.mapped = mapped

    @abstractmethod
    def storage(self, storage: Storage) -> Tensor:
        """The numbers of a storage, in one row, as they lie in the file. Raises ValueError if they are damaged."""

    def copied(self) -> Any:
        """The value with tensors in memory of their own; those that share a storage still do."""
        storages: dict[Storage, Tensor] = {}

        def tensor(view: View) -> Tensor:
            if view.storage not in storages:
                storages[view.storage] = self.storage(view.storage).clone()
            return _tensor(view, storages[view.storage])

        return with_tensors(self.value, tensor)

    def tensor(self, view: View) -> Tensor:
        """A tensor that lies in the mapped file. Raises errors of many kinds if it is damaged."""
        return _tensor(view, self.storage(view.storage))


class Archive(TorchFile):
    """A zip archive with `NAME/data.pkl` and a member `NAME/data/KEY` for each storage."""

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        super().__init__(mapped)
        self._path = path
        with zipfile.ZipFile(path) as archive:
            members = {entry.filename: entry for entry in archive.infolist()}
            roots = [name.removesuffix(_PICKLE) for name in members if name.count("/") == 1 and name.endswith(_PICKLE)]
            if len(roots) != 1:
                raise ValueError("the archive is none of torch.save, as it holds no data.pkl")
            self._root = roots[0]
            self._members, self._whole = members, set[str]()
            self._check_members(path.stat().st_size)
            order = members.get(f"{self._root}byteorder")
            if order is not None and order.file_size < 99 and archive.read(order) != b"little":
                raise ValueError("its numbers are in the byte order of other machines")
            pickled = archive.read(members[f"{self._root}{_PICKLE}"])
        stored = sum(entry.file_size for entry in members.values())
        self.value = read_pickle(io.BytesIO(pickled), len(pickled), torch_table(self._numel, stored))

    def _check_members(self, size: int) -> None:
        for name, entry in self._members.items():
            if entry.flag_bits & 1:
                raise ValueError(f"{name[:60]} is encrypted")
            most = size if entry.compress_type == zipfile.ZIP_STORED else max(_MOST_RATIO * size, _ANY_RATIO)
            if entry.file_size > (_MOST_PICKLE if name.endswith(f"/{_PICKLE}") else most):
                raise ValueError(f"{name[:60]} is said to hold {entry.file_size} bytes")

    def _entry(self, storage: Storage) -> zipfile.ZipInfo:
        return self._members[f"{self._root}data/{storage.key}"]

    def _numel(self, storage: Storage) -> int:
        return self._entry(storage).file_size // storage.dtype.itemsize

    def storage(self, storage: Storage) -> Tensor:
        """See `TorchFile.storage`."""
        entry = self._entry(storage)
        if entry.compress_type != zipfile.ZIP_STORED:
            with zipfile.ZipFile(self._path) as archive:  # which compares the checksum
                data = bytearray(archive.read(entry))
            return _row(data, storage, 0)
        start = self._start(entry)
        if storage.key not in self._whole:
            with memoryview(self.mapped)[start : start + entry.file_size] as written:
                if zlib.crc32(written) != entry.CRC:
                    raise ValueError(f"{entry.filename[:60]} is not what was written; its checksum is another")
            self._whole.add(storage.key)
        return _row(self.mapped, storage, start)

    def _start(self, entry: zipfile.ZipInfo) -> int:
        """Where a member's data begins: behind its name and what else its own header holds."""
        mark, name, extra = _LOCAL_HEADER.unpack_from(self.mapped, entry.header_offset)
        start = entry.header_offset + _LOCAL_HEADER.size + name + extra
        if mark != b"PK\x03\x04" or start + entry.file_size > len(self.mapped):
            raise ValueError(f"{entry.filename[:60]} is not where it should be")
        return int(start)


class Stream(TorchFile):
    """Pickles of a magic number, a version, the machine, the value and the storages' keys; then the storages."""

    def __init__(self, mapped: mmap.mmap) -> None:
        super().__init__(mapped)
        size = min(len(mapped), _MOST_PICKLE)
        asked: dict[str, Storage] = {}

        def numel(storage: Storage) -> int:
            # How many there are is known when all pickles have been read.
            same = asked.setdefault(storage.key, storage)
            return storage.numel if same == storage and storage.numel * storage.dtype.itemsize <= len(mapped) else -1

        table = torch_table(numel, len(mapped))
        first = read_pickle(mapped, size, table)
        if first != _MAGIC or read_pickle(mapped, size, table) != _PROTOCOL:
            raise ValueError("it is not a file of torch.save")
        machine = read_pickle(mapped, size, table)
        if not isinstance(machine, dict) or machine.get("little_endian") is not True:
            raise ValueError("its numbers are in the byte order of other machines")
        self.value = read_pickle(mapped, size, table)
        keys = read_pickle(mapped, size, table)
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise ValueError("its storages have no names")
        self._starts: dict[str, int] = {}
        self._find(keys, asked)

    def _find(self, keys: list[str], asked: Mapping[str, Storage]) -> None:
        at = self.mapped.tell()
        for key in keys:
            (count,) = struct.unpack_from("<q", self.mapped, at)
            storage = asked.get(key)
            if storage is None or count != storage.numel:
                raise ValueError("its storages are not those of its tensors")
            self._starts[key] = at + 8
            at += 8 + count * storage.dtype.itemsize
        if at > len(self.mapped) or self._starts.keys() != asked.keys():
            raise ValueError("its storages are not those of its tensors")

    def storage(self, storage: Storage) -> Tensor:
        """See `TorchFile.storage`."""
        return _row(self.mapped, storage, self._starts[storage.key])


def holds_views(value: Any) -> bool:
    """Whether there is a tensor in a value of a torch file, at any depth."""
    if isinstance(value, dict | Namespace):
        value = list((value if isinstance(value, dict) else vars(value)).values())
    return isinstance(value, View) or (isinstance(value, list | tuple) and any(map(holds_views, value)))


def with_tensors(value: Any, tensor: Callable[[View], Tensor]) -> Any:
    """A value of a torch file with tensors in the place of their views; containers are copied."""
    if isinstance(value, View):
        return tensor(value)
    if isinstance(value, Namespace):
        return Namespace(**{key: with_tensors(inner, tensor) for key, inner in vars(value).items()})
    if isinstance(value, dict) and not isinstance(value, Counter):
        return {key: with_tensors(inner, tensor) for key, inner in value.items()}
    if isinstance(value, list):
        return [with_tensors(inner, tensor) for inner in value]
    if type(value) is tuple:
        return tuple(with_tensors(inner, tensor) for inner in value)
    return value


def _tensor(view: View, row: Tensor) -> Tensor:
    if view.dtype != row.dtype:
        row = row.view(view.dtype)
    return row.as_strided(view.shape, view.stride, view.offset)


def _row(data: mmap.mmap | bytearray, storage: Storage, start: int) -> Tensor:
    """The numbers of a storage that begins there."""
    if not storage.numel:
        return torch.empty(0, dtype=storage.dtype)
    return torch.frombuffer(data, dtype=storage.dtype, count=storage.numel, offset=start)
