"""Files of arrays: their shape without reading them, and parts of them."""

import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
from safetensors import safe_open

from osp.data.media.limits import Limits
from osp.documents import printable

Window = Callable[[tuple[slice | int, ...]], Any]
"""Takes a part of an array out of its file."""


def open_array(file: Path, key: str | None, limits: Limits) -> tuple[Window, tuple[int, ...]]:
    """A function that takes a part of the array out of the file, and the array's shape.

    Both raise ValueError for a file that holds no such array, whatever the libraries raise for it.
    """

    def guarded(read: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return read(*arguments)
        except Exception as error:
            raise ValueError(printable(" ".join(str(error).split()))[:200] or type(error).__name__) from error

    if file.stat().st_size > limits.member_bytes:
        raise ValueError(f"is larger than limits.member_bytes={limits.member_bytes}")
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise ValueError(f"is no file of arrays; {' '.join(_READ)} are read")
    window, shape = guarded(reader, file, key, limits)
    return lambda part: guarded(window, part), shape


def _numpy(file: Path, key: str | None, limits: Limits) -> tuple[Window, tuple[int, ...]]:
    with open(file, "rb") as stream:
        shape = _checked_shape(stream, file.stat().st_size, "it")
    array = np.load(file, mmap_mode="r", allow_pickle=False)
    return lambda part: _own(array[part]), shape


def _zipped(file: Path, key: str | None, limits: Limits) -> tuple[Window, tuple[int, ...]]:
    with zipfile.ZipFile(file) as archive:
        sizes = {info.filename: info.file_size for info in archive.infolist() if info.filename.endswith(".npy")}
        name = _chosen([member.removesuffix(".npy") for member in sizes], key)
        member = f"{name}.npy"
        # The unpacked size is checked before anything is unpacked.
        if sizes[member] > limits.member_bytes:
            raise ValueError(f"{name} unpacks to {sizes[member]} bytes, more than limits.member_bytes")
        with archive.open(member) as stream:
            shape = _checked_shape(stream, sizes[member], name)

    def window(part: tuple[slice | int, ...]) -> Any:
        with zipfile.ZipFile(file) as archive, archive.open(member) as stream:
            return _own(np.lib.format.read_array(stream, allow_pickle=False)[part])

    return window, shape


def _checked_shape(stream: IO[bytes], size: int, name: str) -> tuple[int, ...]:
    """The shape of a NumPy array in so many bytes, of which the header alone is read.

    Raises ValueError for other values than numbers, and for a shape that is larger than the bytes.
    """
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, kind = read(stream)
    _check_kind(kind)
    if math.prod(shape) * kind.itemsize > size:
        raise ValueError(f"{name} claims the shape {shape} in {size} bytes")
    return shape


def _pickled(file: Path, key: str | None, limits: Limits) -> tuple[Window, tuple[int, ...]]:
    raise ValueError("is a pickle, which is not read; save its array as .npy or .safetensors")


def _safetensors(file: Path, key: str | None, limits: Limits) -> tuple[Window, tuple[int, ...]]:
    with safe_open(file, "pt") as tensors:
        name = _chosen([*tensors.keys()], key)
        shape = tuple(tensors.get_slice(name).get_shape())

    def window(part: tuple[slice | int, ...]) -> Any:
        with safe_open(file, "pt") as tensors:
            return tensors.get_slice(name)[part]

    return window, shape


def _chosen(names: list[str], key: str | None) -> str:
    """The array to read of those in a file."""
    if key is None and len(names) == 1:
        return names[0]
    if key is None or key not in names:
        raise ValueError(f"holds the arrays {printable(', '.join(names))[:200] or 'none'}; choose one by key=")
    return key


def _own(window: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A copy in the machine's own order of bytes; numbers of other kinds than torch has become float32."""
    _check_kind(window.dtype)
    return np.array(window, window.dtype if window.dtype == np.uint8 else np.float32)


def _check_kind(kind: np.dtype[Any]) -> None:
    if kind.kind not in "buif":
        raise ValueError(f"holds {kind}, which are no numbers of pixels")


_READERS: dict[str, Callable[[Path, str | None, Limits], tuple[Window, tuple[int, ...]]]] = {
    ".npy": _numpy,
    ".npz": _zipped,
    ".pt": _pickled,
    ".pth": _pickled,
    ".safetensors": _safetensors,
}

_READ = (".npy", ".npz", ".safetensors")

ARRAY_SUFFIXES = tuple(_READERS)
"""The suffixes of the files that `open_array` reads, or refuses with what to do instead."""
