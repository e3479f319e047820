"""Files of arrays: their shape without reading them, and parts of them."""

import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

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
    window, shape = guarded(_READERS[file.suffix.lower()], file, key, limits)
    return lambda part: guarded(window, part), shape


def _numpy(file: Path, key: str | None, limits: Limits) -> tuple[Window, tuple[int, ...]]:
    array = np.load(file, mmap_mode="r", allow_pickle=False)
    return lambda part: _own(array[part]), array.shape


def _zipped(file: Path, key: str | None, limits: Limits) -> tuple[Window, tuple[int, ...]]:
    with zipfile.ZipFile(file) as archive:
        sizes = {info.filename.removesuffix(".npy"): info.file_size for info in archive.infolist()}
        name = _chosen([*sizes], key)
        # The unpacked size is checked before anything is unpacked.
        if sizes[name] > limits.member_bytes:
            raise ValueError(f"{name} unpacks to {sizes[name]} bytes, more than limits.member_bytes")
        with archive.open(f"{name}.npy") as member:
            version = np.lib.format.read_magic(member)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, kind = read(member)
    if math.prod(shape) * kind.itemsize > sizes[name]:
        raise ValueError(f"{name} claims the shape {shape} in {sizes[name]} bytes")

    def window(part: tuple[slice | int, ...]) -> Any:
        with np.load(file, allow_pickle=False) as arrays:
            return _own(arrays[name][part])

    return window, shape


def _torch(file: Path, key: str | None, limits: Limits) -> tuple[Window, tuple[int, ...]]:
    value = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if isinstance(value, dict):
        tensors = {str(name): tensor for name, tensor in value.items() if isinstance(tensor, Tensor)}
        value = tensors[_chosen([*tensors], key)]
    if not isinstance(value, Tensor) or value.is_sparse or value.is_quantized or value.is_complex():
        raise ValueError("holds no plain tensor")
    tensor = value.detach()
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"claims the shape {tuple(tensor.shape)} in {tensor.untyped_storage().nbytes()} bytes")
    return lambda part: tensor[part].clone(), tuple(tensor.shape)


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
    if window.dtype.kind not in "buif":
        raise ValueError(f"holds {window.dtype}, which are no numbers of pixels")
    return np.array(window, window.dtype if window.dtype == np.uint8 else np.float32)


_READERS: dict[str, Callable[[Path, str | None, Limits], tuple[Window, tuple[int, ...]]]] = {
    ".npy": _numpy,
    ".npz": _zipped,
    ".pt": _torch,
    ".pth": _torch,
    ".safetensors": _safetensors,
}

ARRAY_SUFFIXES = tuple(_READERS)
"""The suffixes of the files that `open_array` reads."""
