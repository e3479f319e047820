"""Weight files: read without running code, and checked key by key."""

import pickle
import struct
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from osp.errors import OspError

_SHOWN = 20

# What the readers raise at files that were cut off or altered, as tried with some thousand of them.
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
)


class WeightImportError(OspError):
    """A weight file that cannot be read or does not fit the model."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """What a `.safetensors` or torch file holds, on the CPU. Nothing in the file is executed.

    Raises WeightImportError naming the file if it is missing, damaged, or holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightImportError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings(action="ignore"):  # of odd numbers in damaged files, which are refused anyway
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise WeightImportError(f"{path}: not a readable safetensors file ({error})") from error
    except pickle.UnpicklingError as error:
        raise WeightImportError(f"{path}: holds more than tensors and is refused, or is not a checkpoint") from error
    except _DAMAGED as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise WeightImportError(f"{path}: damaged or not a checkpoint ({reason})") from error
    if not isinstance(loaded, dict):
        raise WeightImportError(f"{path}: holds a {type(loaded).__name__}, not a state dict")
    return loaded


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
    shapes = {key: tuple(value.shape) for key, value in found.items() if isinstance(value, Tensor)}
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

    Raises WeightImportError naming the missing, unknown and misshapen keys.
    """
    wanted = module.state_dict()
    # Files from before torch 0.4.1 lack the counters.
    counters = {key: value for key, value in wanted.items() if key.endswith("num_batches_tracked")}
    state = counters | dict(state)
    check_keys({key: value.shape for key, value in wanted.items()}, state, str(source))
    # `assign` also fills a module that was built without memory (on the meta device)
    module.load_state_dict(state, assign=True)


def _list(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + more
