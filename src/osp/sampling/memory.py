"""How much memory it takes to make a video, found without computing anything."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from osp.denoiser import Denoiser
from osp.devices.live import LiveBytes
from osp.devices.measure import available_memory
from osp.sampling.generator import VideoGenerator
from osp.sampling.offload import BLOCKS_ON_DEVICE
from osp.vae import Tiling
from osp.vae.memory import working_bytes

_MIB, _GIB = 2**20, 2**30
# The solver's state, and the model's input and output, each of them twice with guidance.
_LATENTS = 5


@dataclass(frozen=True)
class MemoryPlan:
    """The bytes on the device: `parts` by name, `phases` with all that is there at once, and the `available` memory.

    `available` is the device's free memory plus the part that the generator's weights hold already; None: not known.
    """

    parts: Mapping[str, int]
    phases: Mapping[str, int]
    available: int | None
    low_memory: bool
    batch: int = 1

    @property
    def peak(self) -> int:
        """The bytes of the phase that needs most."""
        return max(self.phases.values())

    @property
    def fits(self) -> bool:
        """Whether it is likely to go well."""
        return self.available is None or self.peak <= self.available

    @property
    def advice(self) -> str:
        """The settings to change if it does not fit."""
        smaller = "a smaller clip" if self.batch == 1 else "a smaller batch_size or clip"
        return smaller if self.low_memory else f"memory=low, or {smaller}"

    def lines(self) -> list[str]:
        """The plan in lines to read: one; each part too where it takes more than 1 GiB or half of what there is."""
        if self.peak <= min(_GIB, self.available / 2 if self.available is not None else _GIB):
            free = "" if self.available is None else f", of {self.available / _GIB:.2f} GiB free"
            return [f"at most {max(1, round(self.peak / _MIB))} MiB{free}"]
        rows = [f"{name}: {size / _GIB:.2f} GiB" for name, size in self.parts.items()]
        phases = ", ".join(f"{name} {size / _GIB:.2f}" for name, size in self.phases.items())
        there = "" if self.available is None else f" of {self.available / _GIB:.2f} GiB free"
        return [*rows, f"at once, by phase: {phases}; at most {self.peak / _GIB:.2f}{there}"]


def plan_memory(
    generator: VideoGenerator,
    frames: int,
    height: int,
    width: int,
    batch: int = 1,
    low_memory: bool = False,
    tiling: Tiling | None = None,
) -> MemoryPlan:
    """The memory that `generate` needs on the generator's device for a batch of such videos with guidance.

    `tiling` is that of the VAE.

    The tensors of one call of the denoiser and of the VAE are followed through a copy without memory, so that layers,
    patterns and types count as they are; attention is taken as fused, and autocast, which needs less, as if it were
    not there. What the allocator, the text encoder's own tensors and the framework itself take comes on top. Raises
    UsageError for a size that the generator does not take.
    """
    generator.check_size(frames, height, width)
    codec, denoiser = generator.codec, generator.denoiser
    shape = codec.latent_shape(frames, height, width)
    latent = 4 * batch * shape[0] * shape[1] * shape[2] * shape[3]
    rows = batch * (1 if low_memory else 2)
    decoded = 1 if low_memory and codec.vae.can_stream("decoder") else batch
    video = 2 * batch * 3 * frames * height * width * 4  # before and after it is clamped
    tile = (height, width) if tiling is None else (min(tiling.size, height), min(tiling.size, width))
    parts = {
        "text encoder": sum(map(_bytes, generator.text.networks())),
        "denoiser": _bytes(denoiser),
        "one call of the denoiser": call_bytes(denoiser, (rows, *shape[1:]), generator.text.max_tokens),
        "latents": _LATENTS * latent,
        "VAE": _bytes(codec.vae),
        "VAE decoder at work": decoded * working_bytes(codec.vae, "decoder", *tile, codec.dtype),
        "video": video,
    }
    if generator.takes_frames:
        parts["VAE encoder at work"] = batch * working_bytes(codec.vae, "encoder", *tile, codec.dtype)
    text, vae = parts["text encoder"], parts["VAE"]
    offloads = low_memory and generator.device.type != "cpu"
    if offloads:
        blocks = sorted(map(_bytes, denoiser.blocks), reverse=True)
        parts["denoiser"] += sum(blocks[:BLOCKS_ON_DEVICE]) - sum(blocks)
        parts["video"] = 0  # it is in the CPU's memory
    stays = 0 if offloads else text + parts["denoiser"] + vae
    phases = {
        "text": stays or text,
        "given frames": (stays or vae) + parts.get("VAE encoder at work", 0) + video // 2,
        "denoising": (stays or parts["denoiser"]) + parts["one call of the denoiser"] + parts["latents"],
        "decoding": (stays or vae) + parts["VAE decoder at work"] + parts["video"] + latent,
    }
    if not generator.takes_frames:
        del phases["given frames"]
    free = available_memory(generator.device)
    if free is not None:
        free += sum(_bytes(module, on=generator.device) for module in _modules(generator))
    return MemoryPlan(parts, phases, free, low_memory, batch)


def call_bytes(denoiser: Denoiser, rows: tuple[int, int, int, int], text: int) -> int:
    """The most bytes in tensors during one call, besides weights and inputs, for latents `B T H W` of so much text."""
    batch, *size = rows
    with torch.device("meta"), torch.no_grad():
        twin = type(denoiser)(**denoiser.settings).to(denoiser.out.weight.dtype)
        pooled = None if denoiser.pooled_channels is None else torch.empty(batch, denoiser.pooled_channels)
        inputs = torch.empty(batch, denoiser.latent_channels, *size), torch.empty(batch)
        words = torch.empty(batch, text, denoiser.text_channels)
        with LiveBytes() as live, _FusedAttention():
            twin(*inputs, words, None, pooled)
    return live.peak


class _FusedAttention(TorchFunctionMode):
    """Attention without its matrix of scores, which on the meta device it would have."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


def _bytes(module: nn.Module, on: torch.device | None = None) -> int:
    tensors = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors if on is None or tensor.device.type == on.type)


def _modules(generator: VideoGenerator) -> list[nn.Module]:
    return [*generator.text.networks(), generator.denoiser, generator.codec.vae]
