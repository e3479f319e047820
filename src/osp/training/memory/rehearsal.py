"""One batch's forward and backward pass with tensors that hold nothing: what is alive when, and how much is computed.

The real modules run, with the real losses, so that layers, attention patterns, formats and recomputation count as they
are; attention counts as fused, as it is on every device.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from itertools import accumulate
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
from osp.diffusion import Objective
from osp.errors import OspError
from osp.training.adversarial import discriminator_loss, vae_loss
from osp.training.discriminator import PatchDiscriminator
from osp.training.losses import VAELoss
from osp.vae import VideoVAE
from osp.vae.autoencoder import COLOURS


class NotPlannedError(OspError):
    """A training run whose memory nothing here can count."""


ACTIVATIONS = "activations"
OUTSIDE = "activations outside the blocks"
GRADIENTS = "gradients"
COPIES = "copies of weights in half precision"
WAITING = "activations in the memory of the CPU"


KINDS = (ACTIVATIONS, OUTSIDE, GRADIENTS, COPIES, WAITING)


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
        work = _work_space(func, args)
        self.timeline.append(tuple(self.kinds[kind] + (work if kind == self.kind else 0) for kind in KINDS))
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
    offloads: bool = False,
    images: int = 0,
) -> Rehearsal:
    """A batch of latents `B T H W` with so many tokens of text; `text` is an encoder that learns along.

    In a joint batch each has so many `images` beside it. `offloads`: see `Denoiser.offload_activations`.
    """
    batch, *size = latent
    joint = {"images": images} if images else {}
    _fill_tables(denoiser, objective, size)
    with fresh_rotary(), simulated(precision, accelerated):
        model = fake_twin(denoiser).train()
        model.recompute_every = recompute_every
        encoder = None if text is None else fake_twin(text).train()
        clean = torch.empty(batch, model.config.channels, size[0] + images, *size[1:])
        step = _Step()
        followed = _Blocks(model, step, offloads)
        for module in (model, encoder):
            if module is not None:
                step.follow_gradients(module)
        with step:
            noise, times = torch.empty_like(clean), objective.sample_time(batch, tokens=size[1] * size[2])
            beside = torch.empty(batch, model.latent_channels - clean.shape[1], *clean.shape[2:])
            noisy = torch.cat([objective.corrupt(clean, noise, times), beside], dim=1)
            tokens, pooled = read_words(model, encoder, batch, words)
            if images:
                tokens = tokens[:, None].expand(-1, 1 + images, -1, -1)
            prediction = model(noisy, times, tokens, None, pooled, **joint)
            errors, _ = objective.error(prediction, clean, noise, times)
            del prediction, noisy
            torch.autograd.backward(errors.sum())
    return step.result(followed.kept())


def rehearse_vae(
    vae: VideoVAE,
    loss: VAELoss,
    discriminator: PatchDiscriminator | None,
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
            total, terms = vae_loss(model, model, loss, clip, against)
            torch.autograd.backward(total)
            del total, terms
            kept = followed.kept
            if against is not None:
                against.zero_grad()
                torch.autograd.backward(discriminator_loss(model, against, clip))
    return step.result(kept)


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
    With `offloads` the input of a block that is computed again waits on the CPU in between; that of a stage stays, as a
    long skip may take it too.
    """

    def __init__(self, model: Denoiser, live: LiveBytes, offloads: bool) -> None:
        blocks, starts = model.blocks, {0, *accumulate(stage.blocks for stage in model.stages)}
        again = range(0, len(blocks), model.recompute_every) if model.recompute_every and offloads else ()
        self.live, self.count = live, len(blocks)
        self.marks: list[int] = []
        self._offloaded = set(again) - starts
        self._inputs: dict[int, Tensor] = {}
        for number, block in enumerate(blocks):
            block.register_forward_pre_hook(self._entering(number))
            block.register_forward_hook(self._left(number))
        blocks[-1].register_forward_hook(self._leave)

    def kept(self) -> dict[str, int]:
        """Bytes by block."""
        ends = zip(self.marks, self.marks[1:], strict=False)
        return {f"block {number}": max(0, after - before) for number, (before, after) in enumerate(ends)}

    def _entering(self, number: int) -> Callable[[nn.Module, Any], None]:
        def enter(block: nn.Module, inputs: Any) -> None:
            if len(self.marks) != number:  # it is computed again
                if number in self._offloaded:
                    self.live.rename(self._inputs.pop(number), ACTIVATIONS)
                return
            if number in self._offloaded:
                self._inputs[number] = inputs[0]
            self.marks.append(self.live.kinds[ACTIVATIONS])
            if number == 0:
                self.live.kind = ACTIVATIONS
                _on_gradient(inputs[0], self._setting(OUTSIDE))

        return enter

    def _left(self, number: int) -> Callable[[nn.Module, Any, Any], None]:
        def left(block: nn.Module, inputs: Any, output: Any) -> None:
            if number in self._inputs:
                self.live.rename(self._inputs[number], WAITING)

        return left

    def _leave(self, block: nn.Module, inputs: Any, output: Any) -> None:
        if len(self.marks) == self.count:
            self.marks.append(self.live.kinds[ACTIVATIONS])
            self.live.kind = OUTSIDE
            _on_gradient(output[0] if isinstance(output, tuple) else output, self._setting(ACTIVATIONS))

    def _setting(self, kind: str) -> Callable[[Tensor], None]:
        def found(gradient: Tensor) -> None:
            self.live.kind = kind

        return found


def _work_space(func: Any, args: Any) -> int:
    """Bytes that a convolution takes while it runs: its inputs in the layout that the library computes in.

    Where channels come last that are the weights, in that order and then in the library's, and their gradient. Measured
    with oneDNN; libraries of GPUs reorder too.
    """
    if func not in _CONVOLUTIONS:
        return 0
    backward = func is torch.ops.aten.convolution_backward.default
    if args[0].is_contiguous():
        return sum(_size(one) for one in args[: 2 + backward])
    return (2 + (backward and args[-1][1])) * _size(args[1 + backward])


_CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.itemsize


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


def read_words(model: Denoiser, encoder: nn.Module | None, batch: int, words: int) -> tuple[Tensor, Tensor | None]:
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
    times, one = objective.sample_time(1, tokens=1), torch.zeros(1, 1, 1, 1, 1)
    objective.corrupt(one, one, times)
    objective.error(one.expand(-1, objective.prediction_channels(1), -1, -1, -1), one, one, times)


@contextmanager
def without_values() -> Iterator[None]:
    """For what runs on tensors without values: raises NotPlannedError where torch says that it needs them."""
    try:
        yield
    except RuntimeError as error:
        said = str(error).partition("\n")[0]
        raise NotPlannedError(f"a part of the model does not run on tensors without values ({said})") from error


@contextmanager
def fresh_rotary() -> Iterator[None]:
    """Rotary tables are made inside the block, and none of them outlives it."""
    rotary_tables.cache_clear()
    try:
        yield
    finally:
        rotary_tables.cache_clear()
