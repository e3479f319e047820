"""Tensors of which each process holds a part, and the models that they belong to."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from osp.parallel.pieces import fill
from osp.weights.lazy import Weights


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, which shares its memory; the tensor itself where it is not split."""
    return cast(Tensor, cast(Any, tensor).to_local()) if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, which all processes that hold parts of it ask for at once; itself where it is not split."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fill_model(model: nn.Module, weights: Weights) -> None:
    """Give a model's tensors their values, one by one; of those that are split, this process's parts."""
    for key, value in model.state_dict().items():
        if isinstance(value, Tensor):
            fill(value, weights.stored[key])


@contextmanager
def passing_through(*models: nn.Module) -> Iterator[None]:
    """Inside, gradients may be asked for without those of the models' weights (`torch.autograd.grad`).

    The backward pass that follows then finds all that it needs.
    """
    split = [model for model in models if isinstance(model, FSDPModule)]
    for model in split:
        model.set_is_last_backward(False)
    try:
        yield
    finally:
        for model in split:
            model.set_is_last_backward(True)


def kind_of(model: object) -> type:
    """The class that a model was made of; one whose weights are split is of a class of its own."""
    return next(one for one in type(model).__mro__ if not issubclass(one, FSDPModule))
