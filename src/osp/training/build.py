"""Models that are built in two steps: without memory, to check them, and with weights when training begins.

Where processes hold parts of a model, it stays without memory until it is split, and each tensor is made or read by
itself (`initial_weights`), so that no process ever holds the whole.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from osp.conditioning import WordText
from osp.denoiser import Denoiser
from osp.parallel import drawn_weights
from osp.training.discriminator import PatchDiscriminator3d
from osp.vae import VideoVAE
from osp.weights.lazy import Weights

Model = TypeVar("Model", bound=nn.Module)

REBUILT = (Denoiser, VideoVAE, WordText, PatchDiscriminator3d)
"""The classes of models that their own `settings`, plain values, build again."""


def is_drawn(make: object) -> bool:
    """Whether what a configuration names is a class of such models, whose weights are drawn and not read."""
    return isinstance(make, type) and issubclass(make, REBUILT)


def has_memory(model: nn.Module) -> bool:
    """Whether a model has values, and was not built on the meta device."""
    return not any(parameter.is_meta for parameter in model.parameters())


def with_memory(model: Model) -> Model:
    """The model itself, or, where it has no memory, one of the same settings with newly drawn weights."""
    if has_memory(model):
        return model
    assert isinstance(model, REBUILT)
    return type(model)(**model.settings)


def initial_weights(models: Sequence[nn.Module], given: Sequence[Weights | None]) -> list[Weights]:
    """The weights that these models begin with, which are read one by one; the models are left without memory.

    They are the given ones, or the model's own if it has some, or those that `with_memory` would draw for one model
    after the other.
    """
    undrawn = [index for index, model in enumerate(models) if not has_memory(model) and given[index] is None]
    begins = []
    for index, model in enumerate(models):
        weights = given[index]
        if has_memory(model):
            weights = weights or Weights.of(model.state_dict())
            model.to_empty(device="meta")
        elif weights is None or index < max(undrawn, default=0):  # the numbers of those that follow come after its own
            drawn = drawn_weights(partial(with_memory, model))
            weights = weights or drawn
        begins.append(weights)
    return begins


@contextmanager
def drawing_from(state: Tensor) -> Iterator[None]:
    """Draw from the state of random numbers on the CPU that `torch.get_rng_state` gave, and leave today's alone."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(state)
        yield
