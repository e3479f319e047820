"""The values that names in a torch file may make: numbers, arrays of numbers, tensors of stored numbers, settings.

Beside weights, training leaves the settings of its run, NumPy's numbers and arrays, and states of random numbers. Each
function here stands in the place of one that such files name, and refuses arguments that plain values would not have.
"""

import io
import math
import re
from argparse import Namespace
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from osp.weights.pickles import Make, Maker, Name, RefusedError, Table, check_key

_MOST_DIMS = 64  # of a tensor or an array, as NumPy has it
_ARRAY = Name("numpy.ndarray")
_TENSOR_CLASSES = ("torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")


@dataclass(frozen=True)
class Storage:
    """A stored row of numbers, under its key in the file, and how many of which type are said to be in it."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class View:
    """A tensor in a storage, whose numbers all lie in it, each at most once on the average."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def torch_table(numel_of: Callable[[Storage], int], stored: int) -> Table:
    """The table for the pickle of a torch file with so many bytes of storages.

    `numel_of` says how many numbers of its type a storage really holds. Persistent ids are those of torch.save:
    ("storage", type, key, device, numel).
    """

    return Table(_CONSTANTS, _MAKERS, _BUILDERS, lambda identity: _storage(identity, numel_of), stored)


def _storage(identity: Any, numel_of: Callable[[Storage], int]) -> Storage:
    # Files from before torch 1.6 have a sixth part, which is None but for views of storages.
    if not isinstance(identity, tuple) or len(identity) not in (5, 6) or identity[0] != "storage":
        raise RefusedError("a stored object that is no storage")
    _, kind, key, _, numel, *view = identity
    dtype = _STORAGES.get(kind.text) if isinstance(kind, Name) else None
    if dtype is None or not isinstance(key, str) or not _is_count(numel) or any(part is not None for part in view):
        raise RefusedError("a storage of something else than numbers")
    storage = Storage(key, dtype, numel)
    if numel > numel_of(storage):
        raise ValueError(f"storage {key[:40]} is said to hold {numel} numbers and holds {numel_of(storage)}")
    return storage


def _view(maker: Maker, storage: Any, dtype: torch.dtype, offset: Any, shape: Any, stride: Any) -> View:
    if not isinstance(storage, Storage):
        raise RefusedError("a tensor without a storage")
    shape, stride = _counts(shape), _counts(stride)
    numel = math.prod(shape)
    room = storage.numel * storage.dtype.itemsize // dtype.itemsize
    if not _is_count(offset) or len(shape) != len(stride):
        raise ValueError("a tensor's size and strides do not go together")
    last = offset + sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) if numel else offset
    if last >= room + (numel == 0) or numel > room:
        raise ValueError(
            f"a tensor of {'x'.join(map(str, shape))[:60]} numbers lies beyond, or repeats, the {room} of its storage"
        )
    maker.spend_stored(numel * dtype.itemsize)
    return View(storage, dtype, offset, shape, stride)


def _tensor(maker: Maker, arguments: tuple[Any, ...]) -> View:
    """(storage, offset, shape, stride, whether it learns, hooks, metadata); the last three do not count."""
    storage, offset, shape, stride, *_rest = arguments
    if not isinstance(storage, Storage):
        raise RefusedError("a tensor without a storage")
    return _view(maker, storage, storage.dtype, offset, shape, stride)


def _typed_tensor(maker: Maker, arguments: tuple[Any, ...]) -> View:
    """A tensor of a type without a storage of its own; the type is the seventh argument, the others are `_tensor`'s."""
    storage, offset, shape, stride, _learns, _hooks, dtype, *_rest = arguments
    if not isinstance(dtype, torch.dtype):
        raise RefusedError("a tensor of something else than numbers")
    return _view(maker, storage, dtype, offset, shape, stride)


def _parameter(_: Maker, arguments: tuple[Any, ...]) -> View:
    """The tensor itself."""
    data, *_rest = arguments
    if not isinstance(data, View):
        raise RefusedError("a parameter that is no tensor")
    return data


def _with_attributes(maker: Maker, arguments: tuple[Any, ...]) -> View:
    """(function, class, arguments, state): a tensor without its attributes."""
    function, kind, inner, _state = arguments
    make = _TENSOR_MAKERS.get(function.text) if isinstance(function, Name) else None
    if make is None or not isinstance(kind, Name) or kind.text not in _TENSOR_CLASSES or not isinstance(inner, tuple):
        raise RefusedError("a tensor of another class")
    return make(maker, inner)


def _size(maker: Maker, arguments: tuple[Any, ...]) -> torch.Size:
    (sizes,) = arguments
    maker.spend(8 * len(sizes))
    return torch.Size(_counts(sizes))


def _device(_: Maker, arguments: tuple[Any, ...]) -> str:
    """Its name: a device need not be there."""
    if not all(isinstance(part, str | int) for part in arguments):
        raise RefusedError("a device without a name")
    return ":".join(map(str, arguments))


def _encoded(maker: Maker, arguments: tuple[Any, ...]) -> bytes:
    """Bytes, which protocol 2 has as text."""
    text, encoding = arguments
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise RefusedError("bytes in another form")
    maker.spend(len(text))
    return text.encode("latin-1")


def _byte_array(maker: Maker, arguments: tuple[Any, ...]) -> bytearray:
    # Python's `bytearray` of a number would make so many bytes.
    if len(arguments) == 2:
        arguments = (_encoded(maker, arguments),)
    if len(arguments) > 1 or not all(isinstance(part, bytes) for part in arguments):
        raise RefusedError("bytes in another form")
    maker.spend(len(b"".join(arguments)))
    return bytearray(b"".join(arguments))


def _set(maker: Maker, arguments: tuple[Any, ...]) -> set[Any]:
    (items,) = arguments or ([],)
    if not isinstance(items, list | tuple | set):
        raise RefusedError("a set of something else than values")
    maker.spend(64 * len(items))
    return {check_key(item) for item in items}


def _counter(maker: Maker, arguments: tuple[Any, ...]) -> "Counter[Any]":
    (counts,) = arguments or ({},)
    if not isinstance(counts, dict):
        raise RefusedError("counts without a mapping")
    maker.spend(64 * len(counts))
    return Counter(counts)


def _complex(_: Maker, arguments: tuple[Any, ...]) -> complex:
    real, imaginary = arguments
    if not isinstance(real, float) or not isinstance(imaginary, float):
        raise RefusedError("a complex number of something else")
    return complex(real, imaginary)


def _ordered(maker: Maker, arguments: tuple[Any, ...]) -> "OrderedDict[Any, Any]":
    """Empty, or of a list of pairs, as Python 2 wrote it (LPIPS's weights are such a file)."""
    (pairs,) = arguments or ([],)
    if not isinstance(pairs, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise RefusedError("an ordered mapping of something else than pairs")
    maker.spend(64 * len(pairs))
    return OrderedDict((check_key(key), value) for key, value in pairs)


def _empty(make: Callable[[], Any]) -> Make:
    def made(_: Maker, arguments: tuple[Any, ...]) -> Any:
        if arguments:
            raise RefusedError("arguments where there are none")
        return make()

    return made


def _fill_ordered(_: Maker, _made: Any, _state: Any) -> None:
    """Attributes of an OrderedDict (the versions of its modules, in a state dict) are passed over."""


def _fill_settings(_: Maker, settings: Namespace, state: Any) -> None:
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise RefusedError("settings without names")
    vars(settings).update(state)


def _fill_bytes(maker: Maker, file: io.BytesIO, state: Any) -> None:
    """(content, position, attributes)."""
    if not isinstance(state, tuple) or not state or not isinstance(state[0], bytes):
        raise RefusedError("a file in memory without bytes")
    maker.spend(len(state[0]))
    file.seek(0)
    file.write(state[0])
    file.seek(0)


def _array_type(_: Maker, arguments: tuple[Any, ...]) -> "np.dtype[Any]":
    text = arguments[0]
    if not isinstance(text, str) or not re.fullmatch(r"[biufc][0-9]{1,2}", text):
        raise RefusedError("an array of something else than numbers")
    return np.dtype(text)


def _fill_array_type(_: Maker, _made: Any, state: Any) -> None:
    """(version, byte order, ...): nothing but the order is said of a number, and it must be this machine's."""
    order, *inner = state[1:5]
    if order not in ("<", "|", "=") or any(part is not None for part in inner):
        raise RefusedError("an array of something else than numbers")


def _array(_: Maker, arguments: tuple[Any, ...]) -> "np.ndarray[Any, Any]":
    """An empty one, which its state fills. (class, shape, type); what they say has no meaning."""
    if arguments[0] != _ARRAY:
        raise RefusedError("an array of another class")
    return np.empty(0, np.uint8)


def _fill_array(maker: Maker, array: "np.ndarray[Any, Any]", state: Any) -> None:
    """(version, shape, type, whether columns come first, bytes)."""
    version, shape, kind, by_columns, data = state
    shape = _counts(shape)
    if not isinstance(kind, np.dtype) or kind.kind not in "biufc" or not isinstance(data, bytes):
        raise RefusedError("an array of something else than numbers")
    if version != 1 or not isinstance(by_columns, bool) or math.prod(shape) * kind.itemsize != len(data):
        raise ValueError("an array's size is not that of its bytes")
    maker.spend(len(data))
    array.__setstate__((1, shape, kind, by_columns, data))  # type: ignore[arg-type]


def _number(_: Maker, arguments: tuple[Any, ...]) -> Any:
    """A NumPy scalar: (type, bytes)."""
    kind, data = arguments
    if not isinstance(kind, np.dtype) or kind.kind not in "biufc" or not isinstance(data, bytes):
        raise RefusedError("a number of something else than bytes")
    if len(data) != kind.itemsize:
        raise ValueError("a number's size is not that of its bytes")
    return np.frombuffer(data, kind)[0]


def _counts(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple | list) or len(values) > _MOST_DIMS or not all(map(_is_count, values)):
        raise ValueError("sizes that are no numbers")
    return tuple(values)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


_STORAGES = {
    f"torch.{name}Storage": dtype
    for name, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
        "ComplexFloat": torch.complex64,
        "ComplexDouble": torch.complex128,
    }.items()
} | dict.fromkeys(("torch.UntypedStorage", "torch.storage.UntypedStorage"), torch.uint8)

_NUMBERS = ("bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))
_FLOATS = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2")
_CONSTANTS: dict[str, Any] = (
    {f"torch.{name}": getattr(torch, name) for name in (*_NUMBERS, *_FLOATS)}
    | {name: Name(name) for name in (*_STORAGES, *_TENSOR_CLASSES)}
    | {"numpy.ndarray": _ARRAY}
)

_TENSOR_MAKERS: Mapping[str, Make] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _typed_tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _parameter,  # of a device without storages
}
_MAKERS: dict[str, Make] = {
    **_TENSOR_MAKERS,
    "torch.nn.parameter.Parameter": _parameter,
    "torch._tensor._rebuild_from_type_v2": _with_attributes,
    "torch.Size": _size,
    "torch.device": _device,
    "collections.OrderedDict": _ordered,
    "collections.Counter": _counter,
    "builtins.set": _set,
    "builtins.bytes": _empty(bytes),
    "builtins.bytearray": _byte_array,
    "builtins.complex": _complex,
    "_codecs.encode": _encoded,
    "argparse.Namespace": _empty(Namespace),
    "io.BytesIO": _empty(io.BytesIO),
    "_io.BytesIO": _empty(io.BytesIO),
    "numpy.dtype": _array_type,
    # Both functions of NumPy have moved.
    **{f"numpy.{core}.multiarray._reconstruct": _array for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _number for core in ("core", "_core")},
}
_BUILDERS: dict[type, Callable[[Maker, Any, Any], None]] = {
    OrderedDict: _fill_ordered,
    Namespace: _fill_settings,
    io.BytesIO: _fill_bytes,
    np.ndarray: _fill_array,
    **{type(np.dtype(code)): _fill_array_type for code in f"?{np.typecodes['AllInteger']}{np.typecodes['AllFloat']}"},
}
