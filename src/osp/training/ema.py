"""An exponential moving average of a model's weights."""

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


class ExponentialMovingAverage(nn.Module, Generic[Model]):
    """A frozen twin of a model that follows it: twin <- decay * twin + (1 - decay) * model.

    The twin is a submodule, so it is saved, restored, moved and sharded with the model it follows.
    """

    model: Model

    def __init__(self, model: Model, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: Model) -> None:
        """Follow the model one step."""
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1.0 - self.decay)
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)

    def train(self, mode: bool = True) -> "ExponentialMovingAverage[Model]":
        """The twin never trains."""
        return super().train(False)
