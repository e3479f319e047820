"""A bound of a run's memory that is found at once: far too high, and enough to see that a small run fits."""

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves

from osp.devices.simulated import fake_twin
from osp.training.memory.asked import Asked, DenoiserWork, VAEWork
from osp.training.memory.rehearsal import fresh_rotary, read_words, without_values
from osp.vae.autoencoder import COLOURS

_STATES = 12
"""Bytes for a weight that learns, by its own: itself, its average, gradient and two moments; twice what devices
exchange, and copies."""

_PASSES = 8
"""Bytes of a step by those that all modules, large and small, hand on in one pass; real steps take 0.5 to 3."""


def at_most(asked: Asked) -> int:
    """More bytes than a device takes for a run, found from one forward pass without memory or values.

    Raises NotPlannedError for a model that does not run without values.
    """
    work, size = asked.work, (asked.batch, COLOURS, *asked.shape)
    passed = _Passed()
    with without_values(), torch.device("meta"), torch.no_grad(), fresh_rotary(), passed:
        if isinstance(work, DenoiserWork):
            learned = [fake_twin(model).train() for model in (work.denoiser, work.text) if model is not None]
            _denoise(asked, work, *learned)
            if work.vae is not None:
                fake_twin(work.vae).encode(torch.empty(size))
        else:
            learned = [fake_twin(model).train() for model in (work.vae, work.discriminator) if model is not None]
            _reconstruct(asked, work, *learned)
    weights = sum(parameter.numel() * parameter.itemsize for model in learned for parameter in model.parameters())
    frozen = work.frozen if isinstance(work, DenoiserWork) else 0
    batches = 8 * asked.accumulate * torch.Size(size).numel()
    return _STATES * weights + frozen + batches + _PASSES * passed.bytes


class _Passed:
    """The bytes of all that modules hand on inside the block."""

    def __init__(self) -> None:
        self.bytes = 0

    def __enter__(self) -> None:
        self._hook = register_module_forward_hook(self._add)

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _add(self, module: nn.Module, inputs: object, outputs: object) -> None:
        self.bytes += sum(one.numel() * one.itemsize for one in tree_leaves(outputs) if isinstance(one, Tensor))


def _denoise(asked: Asked, work: DenoiserWork, denoiser: nn.Module, text: nn.Module | None = None) -> None:
    latent = torch.empty(asked.batch, work.denoiser.latent_channels, *asked.latent)
    tokens, pooled = read_words(work.denoiser, text, asked.batch, work.words)
    denoiser(latent, torch.empty(asked.batch), tokens, None, pooled)


def _reconstruct(asked: Asked, work: VAEWork, vae: nn.Module, discriminator: nn.Module | None = None) -> None:
    clip = torch.empty(asked.batch, COLOURS, *asked.shape)
    vae(clip)
    if discriminator is not None:
        discriminator(clip)
        discriminator(clip)
    if (perceptual := work.loss.perceptual) is not None:
        height, width = (max(perceptual.min_side, side) for side in asked.shape[1:])
        frames = torch.empty(asked.batch * asked.shape[0], COLOURS, height, width)
        fake_twin(perceptual).lpips(frames, frames)
