"""An exponential moving average of a model's weights."""

import copy
from itertools import chain
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from osp.parallel import local

Model = TypeVar("Model", bound=nn.Module)


class ExponentialMovingAverage(nn.Module, Generic[Model]):
    """A frozen twin of a model that follows it: twin <- decay * twin + (1 - decay) * model.

    The twin is a submodule, so it is saved, restored and moved with the model it follows. Where processes hold parts of
    the weights, the twin is split alike, and each process follows with its own parts.
    """

    model: Model

    def __init__(self, model: Model, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.model = _unset_twin(model).eval()
        self.copy(model)

    @torch.no_grad()
    def copy(self, model: Model) -> None:
        """Take over the model's weights as they are, tensor by tensor."""
        for mine, theirs in zip(_tensors(self.model), _tensors(model), strict=True):
            local(mine).copy_(local(theirs))

    @torch.no_grad()
    def update(self, model: Model) -> None:
        """Follow the model one step."""
        mine, theirs = ([local(one) for one in side.parameters()] for side in (self.model, model))
        torch._foreach_lerp_(mine, theirs, 1.0 - self.decay)
        for held, now in zip(self.model.buffers(), model.buffers(), strict=True):
            held.copy_(now)

    def train(self, mode: bool = True) -> "ExponentialMovingAverage[Model]":
        """The twin never trains."""
        return super().train(False)


def _tensors(model: nn.Module) -> chain[Tensor]:
    return chain(model.parameters(), model.buffers())


def _unset_twin(model: Model) -> Model:
    """A model of the same modules that does not learn, whose tensors have the sizes of the model's and no values yet.

    Only the modules are copied: tensors are made one by one, each where and as the model's lies.
    """
    twins: dict[int, Tensor] = {}
    for parameter in model.parameters():
        twins[id(parameter)] = nn.Parameter(torch.empty_like(parameter, requires_grad=False), requires_grad=False)
    for buffer in model.buffers():
        twins[id(buffer)] = torch.empty_like(buffer)
    return copy.deepcopy(model, memo=dict(twins))
