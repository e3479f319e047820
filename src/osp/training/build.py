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
from osp.training.checkpoints import load_trained_vae
from osp.training.discriminator import PatchDiscriminator
from osp.vae import VideoVAE
from osp.weights import load_pretrained, load_published
from osp.weights.lazy import Weights, filled, take_unread

Model = TypeVar("Model", bound=nn.Module)

REBUILT = (Denoiser, VideoVAE, WordText, PatchDiscriminator)
"""The classes of models that their own `settings`, plain values, build again."""

READERS = (load_pretrained, load_published, load_trained_vae)
"""What gives a model with weights of a file or folder; under `torch.device("meta")` these are still to be read."""


def is_built_later(make: object) -> bool:
    """Whether what a configuration names gives a model, under `torch.device("meta")`, that `with_memory` completes."""
    return make in READERS or (isinstance(make, type) and issubclass(make, REBUILT))


def has_memory(model: nn.Module) -> bool:
    """Whether a model has values, and was not built on the meta device."""
    return not any(parameter.is_meta for parameter in model.parameters())


def with_memory(model: Model) -> Model:
    """The model itself, or, where it has no memory, with the weights that are to be read, or newly drawn ones."""
    if has_memory(model):
        return model
    if (weights := take_unread(model)) is not None:
        return filled(model, weights)
    assert isinstance(model, REBUILT)
    return type(model)(**model.settings)


def initial_weights(models: Sequence[nn.Module], given: Sequence[Weights | None]) -> list[Weights]:
    """The weights that these models begin with, which are read one by one; the models are left without memory.

    They are the given ones, or the model's own if it has some or they are to be read, or those that `with_memory`
    would draw for one model after the other.
    """
    owned = [Weights.of(model.state_dict()) if has_memory(model) else take_unread(model) for model in models]
    undrawn = [index for index, own in enumerate(owned) if own is None and given[index] is None]
    begins = []
    for index, model in enumerate(models):
        weights = given[index]
        if (own := owned[index]) is not None:
            weights = weights or own
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
