"""A computation of which only the sizes, types and lifetimes of its tensors are real: nothing is computed or held.

Tensors are torch's fake ones on the CPU, whatever device is meant: a build of torch without an accelerator cannot
differentiate fake tensors on one. The numbers' formats are those of the device that is meant.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from osp.devices.precision import autocast_dtype

Model = TypeVar("Model", bound=nn.Module)

# Functions that autocast computes in float32 on accelerators but not on the CPU, of those that models here call.
_FLOAT32 = ("layer_norm", "group_norm")


@contextmanager
def simulated(precision: str, accelerated: bool) -> Iterator[None]:
    """Make tensors inside the block fake ones, and compute them in the format of a name in AUTOCAST.

    `accelerated` means an accelerator instead of the CPU. Casted weights are not cached, as they are not under
    Lightning's mixed precision either: they go with what is computed from them.
    """
    dtype = autocast_dtype(precision)
    half = torch.autocast("cpu", dtype=dtype, enabled=dtype is not None, cache_enabled=False)
    with half, FakeTensorMode(allow_non_fake_inputs=True), _in_float32(_FLOAT32 if accelerated else ()):
        yield


def fake_twin(model: Model) -> Model:
    """The same modules with fake tensors of the same sizes and types; to be called inside `simulated`."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        twin = torch.empty(parameter.shape, dtype=parameter.dtype)
        memo[id(parameter)] = nn.Parameter(twin, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return copy.deepcopy(model, memo)


@contextmanager
def _in_float32(names: Sequence[str]) -> Iterator[None]:
    """Compute these functions of torch.nn.functional in float32 under autocast."""
    # A mode of torch functions would not see what is computed again in a backward pass.
    before = {name: getattr(F, name) for name in names}
    try:
        for name, function in before.items():
            setattr(F, name, _widened(function))
        yield
    finally:
        for name, function in before.items():
            setattr(F, name, function)


def _widened(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def widened(*args: Any, **kwargs: Any) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            args = tuple(_float(one) for one in args)
            kwargs = {key: _float(value) for key, value in kwargs.items()}
        return function(*args, **kwargs)

    return widened


def _float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) else value
