"""Models that are built in two steps: without memory, to check them, and with weights when training begins."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from osp.conditioning import WordText
from osp.denoiser import Denoiser
from osp.training.discriminator import PatchDiscriminator3d
from osp.vae import VideoVAE

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


@contextmanager
def drawing_from(state: Tensor) -> Iterator[None]:
    """Draw from the state of random numbers on the CPU that `torch.get_rng_state` gave, and leave today's alone."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(state)
        yield
