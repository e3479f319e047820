"""Weight files: read without running code, tensor by tensor if need be, and checked key by key."""

import errno
import json
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from osp.checks import is_finite
from osp.documents import printable
from osp.errors import OspError
from osp.files import no_weights, sync
from osp.weights.lazy import Stored, Weights
from osp.weights.pickled import View
from osp.weights.pickles import RefusedError
from osp.weights.torch_files import Content, TorchFile, open_torch

_SHOWN = 20

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes of safetensors files by their names there."""

# The errors of the readers for files that were cut off or altered, as found with some thousand such files.
_DAMAGED = (
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    OverflowError,
    MemoryError,
    AssertionError,
    struct.error,
    zipfile.BadZipFile,
)


class WeightImportError(OspError):
    """A weight file that cannot be read or does not fit the model."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The contents of a `.safetensors` or torch file, on the CPU. Nothing in the file is executed.

    Raises WeightImportError naming the file if it is missing, damaged, or holds more than tensors and plain values.
    """
    with _file(path) as file:
        return load_file(file) if file.suffix == ".safetensors" else _state_dict(path, open_torch(file).copied())


def open_checkpoint(path: str | Path) -> Mapping[str, Any]:
    """The contents as by `read_checkpoint`, but tensors stay in the file until they are used, if its format lets them.

    A safetensors file gives Weights. Tensors of a torch file lie in its mapping: whoever keeps one copies it.
    """
    with _file(path) as file:
        if file.suffix == ".safetensors":
            return _open_safetensors(file)
        opened = open_torch(file)
        return Content(_state_dict(path, opened.value), partial(_stored, file, opened))


def checksum(value: Tensor) -> str:
    """Eight hexadecimal digits (CRC-32) that change with the bits of a tensor."""
    return f"{zlib.crc32(_bytes(value)):08x}"


def _bytes(value: Tensor) -> Any:
    return value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def save_weights(path: Path, weights: Weights, *, finite: bool = True) -> dict[str, str]:
    """Write a safetensors file, one tensor after another, and bring it to the disk; gives the checksum of each.

    Raises WeightImportError for weights that are not finite, unless they need not be.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    # The widest dtypes come first, so that all tensors are aligned.
    ordered = dict(sorted(weights.stored.items(), key=lambda item: -item[1].dtype.itemsize))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, stored in ordered.items():
        begin, end = end, end + math.prod(stored.shape) * stored.dtype.itemsize
        header[key] = {"dtype": names[stored.dtype], "shape": stored.shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        checksums = {key: _write(file, key, stored, finite) for key, stored in ordered.items()}
        sync(file)
    return checksums


def _write(file: BinaryIO, key: str, stored: Stored, finite: bool) -> str:
    """Write a tensor, which is let go then; gives its checksum."""
    value = stored.read().detach().cpu()
    if finite and not is_finite(value):
        raise WeightImportError(f"{printable(key)} holds numbers that are not finite (NaN or infinity)")
    file.write(_bytes(value))
    return checksum(value)


def check_keys(
    expected: Mapping[str, Sequence[int]],
    found: Mapping[str, Any],
    source: str = "the checkpoint",
    optional: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Raise WeightImportError listing the keys of `found` that are unknown, missing or misshapen, if there are any.

    `expected` and `optional` hold shapes by key; an optional key may be missing.
    """
    expected = {**expected, **{key: shape for key, shape in (optional or {}).items() if key in found}}
    shapes = Weights.of(found).shapes
    wrong = {
        "missing": [key for key in expected if key not in shapes],
        "unknown": [key for key in found if key not in expected],
        "of another shape": [
            f"{key} ({shapes[key]} instead of {tuple(shape)})"
            for key, shape in expected.items()
            if key in shapes and shapes[key] != tuple(shape)
        ],
    }
    listed = [f"{len(keys)} {what}: {_list(keys)}" for what, keys in wrong.items() if keys]
    if listed:
        raise WeightImportError(f"{source} does not fit the model; {'; '.join(listed)}")


def load_exactly(module: nn.Module, state: Mapping[str, Any], source: str | Path) -> None:
    """Load a state dict; unlike `strict=True` the error is one line, and BatchNorm's step counter may be absent.

    Weights come into the precision of the module. Raises WeightImportError naming the missing, unknown and misshapen
    keys, and as `sound`.
    """
    wanted = module.state_dict()
    # Files from before torch 0.4.1 lack the counters.
    counters = {key: value for key, value in wanted.items() if key.endswith("num_batches_tracked")}
    weights = Weights.of(counters | {key: state[key] for key in state})
    check_keys({key: value.shape for key, value in wanted.items()}, weights, str(source))
    weights = sound(weights, wanted, str(source))
    # `assign` also fills a module that was built without memory (on the meta device)
    module.load_state_dict({key: value.to(wanted[key].dtype) for key, value in weights.items()}, assign=True)


def sound(weights: Weights, wanted: Mapping[str, Any], source: str) -> Weights:
    """The weights, each of which is looked at when it is read; `wanted` holds what they are for by the same keys.

    Raises WeightImportError for one that is no floating-point numbers where these are wanted, and, when it is read, for
    one with numbers that are not finite: a model with such weights makes nothing else.
    """

    def finite(key: str, value: Tensor) -> Tensor:
        if not is_finite(value):
            raise WeightImportError(f"{source}: {printable(key)} holds numbers that are not finite (NaN or infinity)")
        return value

    def looked_at(key: str, one: Stored) -> Stored:
        def part(begin: int, end: int) -> Tensor:
            return finite(key, one.rows(begin, end))

        return Stored(one.shape, one.dtype, lambda: finite(key, one.read()), part)

    for key, stored in weights.stored.items():
        if key in wanted and _is_floating(wanted[key]) and not stored.dtype.is_floating_point:
            raise WeightImportError(
                f"{source}: {printable(key)} is {stored.dtype}, where floating-point weights belong"
            )
    return Weights({key: looked_at(key, one) for key, one in weights.stored.items()})


def _is_floating(wanted: Any) -> bool:
    return not isinstance(wanted, Tensor) or wanted.is_floating_point()


def _list(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + more


@contextmanager
def _file(path: str | Path) -> Iterator[Path]:
    """The file, and what is raised while it is read as one WeightImportError that names it."""
    path = Path(path)
    if not path.is_file():
        raise WeightImportError(f"{path}: no such file")
    if told := no_weights(path):
        raise WeightImportError(f"{path}: {told}")
    try:
        yield path
    except SafetensorError as error:
        raise WeightImportError(f"{path}: not a readable safetensors file ({error})") from error
    except RefusedError as error:
        raise WeightImportError(
            f"{path}: holds more than tensors ({error}) and is refused, or is not a checkpoint; "
            "save its state dict alone, with torch.save, where it was made"
        ) from error
    except (*_DAMAGED, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # of an archive whose offsets are negative
            raise
        reason = printable(str(error).split("\n")[0])[:200] or type(error).__name__
        raise WeightImportError(f"{path}: damaged or not a checkpoint ({reason})") from error


def _state_dict(path: str | Path, loaded: Any) -> dict[str, Any]:
    if not isinstance(loaded, dict):
        raise WeightImportError(f"{path}: holds a {type(loaded).__name__}, not a state dict")
    return loaded


def _stored(path: Path, opened: TorchFile, view: View) -> Stored:
    def read() -> Tensor:
        with _file(path):
            return opened.tensor(view)

    return Stored(view.shape, view.dtype, read)


def _open_safetensors(path: Path) -> Weights:
    file = safe_open(path, framework="pt")
    slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (it is no mapping)
    return Weights(
        {
            key: Stored(
                tuple(part.get_shape()),
                DTYPES[part.get_dtype()],
                partial(_read_tensor, path, file, key),
                partial(_read_rows, path, part),
            )
            for key, part in slices.items()
        }
    )


def _read_tensor(path: Path, file: Any, key: str) -> Tensor:
    with _file(path):
        value: Tensor = file.get_tensor(key)
    return value


def _read_rows(path: Path, part: Any, begin: int, end: int) -> Tensor:
    with _file(path):
        value: Tensor = part[begin:end]
    return value
