"""One batch's forward and backward pass with tensors that hold nothing: what is alive when, and how much is computed.

The real modules run, with the real losses, so that layers, attention patterns, formats and recomputation count as they
are; attention counts as fused, as it is on every device.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from osp.conditioning import WordText
from osp.conditioning.words import WORD_BYTES
from osp.denoiser import Denoiser
from osp.denoiser.grid import Grid
from osp.denoiser.rotary import rotary_tables
from osp.devices.live import LiveBytes, flops_of
from osp.devices.simulated import fake_twin, simulated
from osp.diffusion import Objective, squared_error
from osp.training.discriminator import PatchDiscriminator3d, adaptive_weight, hinge_loss
from osp.training.losses import VAELoss
from osp.vae import WFVAE, VideoVAE
from osp.vae.autoencoder import COLOURS

ACTIVATIONS = "activations"
OUTSIDE = "activations outside the blocks"
GRADIENTS = "gradients"
COPIES = "copies of weights in half precision"


KINDS = (ACTIVATIONS, OUTSIDE, GRADIENTS, COPIES)


@dataclass(frozen=True)
class Rehearsal:
    """A batch's way forward and back.

    `timeline` are the bytes of each of KINDS after each operation, weights and the batch itself left out. `kept` are
    those that a part (a block, an encoder) leaves for the backward pass. `flops` are the operations, recomputed ones
    included.
    """

    timeline: NDArray[np.int64]
    kept: Mapping[str, int]
    flops: int

    def peak(self, share: Mapping[str, float]) -> dict[str, int]:
        """The bytes by kind when a device has most, if it has this share of each kind; 1 where nothing is said."""
        shares = [share.get(kind, 1.0) for kind in KINDS]
        most = self.timeline[np.argmax(self.timeline @ np.array(shares))]
        return {kind: round(size * part) for kind, size, part in zip(KINDS, most.tolist(), shares, strict=True)}


class _Step(LiveBytes):
    """A step's bytes and operations. The copies that autocast makes of weights are of a kind of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.kind = OUTSIDE
        self.flops = 0
        self.timeline: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Run the operation and count it."""
        if func is torch.ops.prim.device.default:
            return func(*args)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.flops += flops_of(func, args, kwargs or {}, result)
        self.timeline.append(tuple(self.kinds[kind] for kind in KINDS))
        return result

    def kind_of(self, func: Any, args: Any) -> str:
        """See `LiveBytes`."""
        is_copy = func is torch.ops.aten._to_copy.default and isinstance(args[0], nn.Parameter)
        return COPIES if is_copy else self.kind

    def follow_gradients(self, model: nn.Module) -> None:
        """Tell the gradients of a model from the rest."""
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._name_gradient)

    def _name_gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.rename(parameter.grad, GRADIENTS)

    def result(self, kept: Mapping[str, int]) -> Rehearsal:
        """All that was found."""
        return Rehearsal(np.unique(np.array(self.timeline), axis=0), kept, self.flops)


def rehearse_denoiser(
    denoiser: Denoiser,
    text: nn.Module | None,
    objective: Objective,
    latent: Sequence[int],
    words: int,
    recompute_every: int,
    precision: str,
    accelerated: bool,
) -> Rehearsal:
    """A batch of latents `B T H W` with so many tokens of text; `text` is an encoder that learns along."""
    batch, *size = latent
    _fill_tables(denoiser, objective, size)
    with _fresh_rotary(), simulated(precision, accelerated):
        model = fake_twin(denoiser).train()
        model.recompute_every = recompute_every
        encoder = None if text is None else fake_twin(text).train()
        clean = torch.empty(batch, model.config.out_channels, *size)
        step = _Step()
        followed = _Blocks(model.blocks, step)
        for module in (model, encoder):
            if module is not None:
                step.follow_gradients(module)
        with step:
            noise, times = torch.empty_like(clean), objective.sample_time(batch, tokens=size[1] * size[2])
            beside = torch.empty(batch, model.latent_channels - clean.shape[1], *size)
            noisy = torch.cat([objective.corrupt(clean, noise, times), beside], dim=1)
            tokens, pooled = _words(model, encoder, batch, words)
            prediction = model(noisy, times, tokens, None, pooled)
            errors, _ = squared_error(prediction, objective.target(clean, noise, times), objective.weight(times))
            del prediction, noisy
            torch.autograd.backward(errors.sum())
    return step.result(followed.kept())


def rehearse_vae(
    vae: WFVAE,
    loss: VAELoss,
    discriminator: PatchDiscriminator3d | None,
    video: Sequence[int],
    precision: str,
    accelerated: bool,
) -> Rehearsal:
    """A batch of videos `B T H W` through the VAE and, with a discriminator, both of the losses against it."""
    batch, *size = video
    with simulated(precision, accelerated):
        model, loss = fake_twin(vae).train(), copy(loss)
        loss.perceptual = None if loss.perceptual is None else fake_twin(loss.perceptual)
        against = None if discriminator is None else fake_twin(discriminator).train()
        clip = torch.empty(batch, COLOURS, *size)
        parts = {"encoder": model.get_submodule("encoder"), "decoder": model.get_submodule("decoder")}
        if loss.perceptual is not None:
            parts["perceptual distance"] = loss.perceptual
        if against is not None:
            parts["discriminator"] = against
        step = _Step()
        for module in (model, against):
            if module is not None:
                step.follow_gradients(module)
        followed = _Parts(parts, step)
        with step:
            clip = clip * 1.0  # the batch in floating point
            torch.autograd.backward(_vae_loss(model, loss, against, clip))
            kept = followed.kept
            if against is not None:
                against.zero_grad()
                torch.autograd.backward(_discriminator_loss(model, against, clip))
    return step.result(kept)


def _vae_loss(vae: WFVAE, loss: VAELoss, discriminator: PatchDiscriminator3d | None, video: Tensor) -> Tensor:
    """The VAE's loss, as in `VAEModule`, whose own needs a Trainer."""
    result = vae(video)
    losses = loss(video, result)
    if discriminator is None:
        return losses.total
    adversarial = -discriminator(result.reconstruction).float().mean()
    return losses.total + adversarial * adaptive_weight(losses.reconstruction, adversarial, vae.last_layer.weight)


def _discriminator_loss(vae: WFVAE, discriminator: PatchDiscriminator3d, video: Tensor) -> Tensor:
    with torch.no_grad():
        reconstruction = vae(video).reconstruction
    return hinge_loss(discriminator(video).float(), discriminator(reconstruction).float())


def rehearse_encoding(vae: VideoVAE, video: Sequence[int], precision: str, accelerated: bool) -> Rehearsal:
    """A batch of videos `B T H W` that a frozen VAE encodes."""
    batch, *size = video
    with simulated(precision, accelerated):
        model = fake_twin(vae).eval().requires_grad_(False)
        clip = torch.empty(batch, COLOURS, *size)
        step = _Step()
        with step, torch.no_grad():
            clip = clip * 1.0
            model.encode(clip)
    return step.result({})


class _Blocks:
    """Follows a model through its blocks: what is made from the first one's input to the last one's output is theirs.

    The same holds on the way back. `kept` are the bytes that each block leaves for the backward pass.
    """

    def __init__(self, blocks: nn.ModuleList, live: LiveBytes) -> None:
        self.live, self.count = live, len(blocks)
        self.marks: list[int] = []
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(self._entering(number))
        blocks[-1].register_forward_hook(self._leave)

    def kept(self) -> dict[str, int]:
        """Bytes by block."""
        ends = zip(self.marks, self.marks[1:], strict=False)
        return {f"block {number}": max(0, after - before) for number, (before, after) in enumerate(ends)}

    def _entering(self, number: int) -> Callable[[nn.Module, Any], None]:
        def enter(block: nn.Module, inputs: Any) -> None:
            if len(self.marks) != number:
                return  # it is computed again
            self.marks.append(self.live.kinds[ACTIVATIONS])
            if number == 0:
                self.live.kind = ACTIVATIONS
                _on_gradient(inputs[0], self._setting(OUTSIDE))

        return enter

    def _leave(self, block: nn.Module, inputs: Any, output: Any) -> None:
        if len(self.marks) == self.count:
            self.marks.append(self.live.kinds[ACTIVATIONS])
            self.live.kind = OUTSIDE
            _on_gradient(output[0] if isinstance(output, tuple) else output, self._setting(ACTIVATIONS))

    def _setting(self, kind: str) -> Callable[[Tensor], None]:
        def found(gradient: Tensor) -> None:
            self.live.kind = kind

        return found


def _on_gradient(tensor: Tensor, call: Callable[[Tensor], None]) -> None:
    if tensor.requires_grad:
        tensor.register_hook(call)


class _Parts:
    """The bytes that each part of a model leaves for the backward pass, summed over its calls."""

    def __init__(self, parts: Mapping[str, nn.Module], live: LiveBytes) -> None:
        self.kept: dict[str, int] = {}
        for name, part in parts.items():
            part.register_forward_pre_hook(self._adding(name, live, -1))
            part.register_forward_hook(self._adding(name, live, 1))

    def _adding(self, name: str, live: LiveBytes, sign: int) -> Callable[..., None]:
        def add(*_: Any) -> None:
            self.kept = self.kept | {name: self.kept.get(name, 0) + sign * live.kinds[OUTSIDE]}

        return add


def _words(model: Denoiser, encoder: nn.Module | None, batch: int, words: int) -> tuple[Tensor, Tensor | None]:
    """Text `B L D` and pooled text `B P` as the model takes them."""
    if isinstance(encoder, WordText):
        text = encoder.read(torch.empty(batch, words, WORD_BYTES, dtype=torch.long), False)
        return text.text, text.pooled if model.pooled_channels is not None else None
    pooled = None if model.pooled_channels is None else torch.empty(batch, model.pooled_channels)
    return torch.empty(batch, words, model.text_channels), pooled


def _fill_tables(denoiser: Denoiser, objective: Objective, size: Sequence[int]) -> None:
    """Compute now what is kept for good: values that a rehearsal needs, or must not leave behind as fake ones."""
    patch = denoiser.patch_size
    for pattern in dict.fromkeys(denoiser.schedule):
        pattern.runs(Grid(size[0], size[1] // patch, size[2] // patch))
    times = objective.sample_time(1, tokens=1)
    objective.levels(times)
    objective.weight(times)


@contextmanager
def _fresh_rotary() -> Iterator[None]:
    """Rotary tables are made inside the block, and none of them outlives it."""
    rotary_tables.cache_clear()
    try:
        yield
    finally:
        rotary_tables.cache_clear()
