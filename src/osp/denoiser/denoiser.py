"""What the two transformers share: their inputs, checked, and the way through their blocks."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from osp.denoiser.attention import GroupAttention
from osp.denoiser.grid import Grid
from osp.denoiser.layers import PatchEmbedding
from osp.denoiser.patterns import Pattern
from osp.denoiser.schedule import Stage
from osp.errors import UsageError


class Denoiser(nn.Module):
    """A transformer from a noisy latent, the diffusion time and text to a prediction of the latent's shape.

    `checkpoint_every` trades time for memory in training: of every so many blocks one keeps only its inputs and is
    computed again for the backward pass; 1: all of them, 0: none.
    """

    blocks: nn.ModuleList
    patch: PatchEmbedding
    out: nn.Linear

    def __init__(self, config: Any, channels: int, text_channels: int, pooled_channels: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.latent_channels = channels
        self.text_channels = text_channels
        self.pooled_channels = pooled_channels
        self.patch_size: int = config.patch_size
        self.stages: tuple[Stage, ...] = config.stages
        self.schedule: list[Pattern] = [pattern for stage in self.stages for pattern in stage.patterns]
        self.checkpoint_every = 0
        self.neutral: list[Any] = []

    def start_neutral(self, *parts: nn.ModuleList) -> None:
        """Start the modules in these so that they change nothing; `restage` may add them to a trained model."""
        self.neutral = [module for part in parts for module in part]
        for module in self.neutral:
            module.reset_parameters()

    @property
    def settings(self) -> dict[str, Any]:
        """What builds the model again, as plain values."""
        settings = asdict(self.config)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}

    def check(
        self,
        latent: Tensor,
        time: Tensor,
        text: Tensor,
        text_mask: Tensor | None,
        pooled_text: Tensor | None,
        video_mask: Tensor | None,
    ) -> Grid:
        """The grid of tokens. Raises UsageError naming the input that does not fit, before anything is computed."""
        if latent.ndim != 5 or latent.shape[1] != self.latent_channels:
            raise UsageError(f"latent {_shape(latent)} does not fit; it must be B {self.latent_channels} T H W")
        batch, _, frames, height, width = latent.shape
        for name, side in (("height", height), ("width", width)):
            if side % self.patch_size:
                raise UsageError(f"latent {name} {side} is no multiple of the patch size {self.patch_size}")
        wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {"time": (time, (batch,))}
        if text.ndim != 3 or text.shape[0] != batch or text.shape[2] != self.text_channels or not text.shape[1]:
            raise UsageError(f"text {_shape(text)} does not fit; it must be {batch} L {self.text_channels}")
        wanted["text_mask"] = text_mask, (batch, text.shape[1])
        wanted["video_mask"] = video_mask, (batch, frames, height, width)
        if self.pooled_channels is not None:
            wanted["pooled_text"] = pooled_text, (batch, self.pooled_channels)
            if pooled_text is None:
                raise UsageError(f"pooled_text is missing; it must be {batch} {self.pooled_channels}")
        for name, (value, shape) in wanted.items():
            if value is not None and tuple(value.shape) != shape:
                raise UsageError(f"{name} {_shape(value)} does not fit; it must be {' '.join(map(str, shape))}")
        return Grid(frames, height // self.patch_size, width // self.patch_size)

    def token_mask(self, video_mask: Tensor | None) -> Tensor | None:
        """`B T H W` -> `B N`: a token is real if any part of its patch is; None if all are."""
        if video_mask is None:
            return None
        mask = video_mask.bool()
        if bool(mask.all()):
            return None
        patches = mask.unflatten(3, (-1, self.patch_size)).unflatten(2, (-1, self.patch_size))
        return patches.any(dim=5).any(dim=3).flatten(1)

    @torch.compiler.disable  # it looks into the masks; the blocks themselves compile as a whole
    def attentions(
        self, grid: Grid, batch: int, device: torch.device, *masks: Tensor | None, text: int = 0
    ) -> dict[Pattern, GroupAttention]:
        """The attention of each pattern of the schedule."""
        return {
            pattern: GroupAttention(pattern, grid, batch, device, *masks, text=text)
            for pattern in dict.fromkeys(self.schedule)
        }

    def compile_blocks(self, **options: Any) -> None:
        """Compile each block in place, with the options of torch.compile; blocks with the same pattern share it."""
        # One program for each pattern, one for the last block, and as many again for a few more grids.
        wanted = 4 * (len(set(self.schedule)) + 1)
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, wanted)
        for block in self.blocks:
            block.compile(**options)

    def run_block(self, index: int, *inputs: Any) -> Any:
        """One block, which is computed again for the backward pass if `checkpoint_every` says so."""
        block = self.blocks[index]
        if self.checkpoint_every and index % self.checkpoint_every == 0 and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False)
        return block(*inputs)

    def to_latent(self, patches: Tensor, grid: Grid) -> Tensor:
        """Patches `B N (p q C)` -> `B C T H W`."""
        x = patches.unflatten(2, (self.patch_size, self.patch_size, -1)).unflatten(1, grid)  # B T H W p q C
        return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5).flatten(3, 4)


def trim_text(text: Tensor, mask: Tensor | None, alone: bool) -> tuple[Tensor, Tensor | None]:
    """Text `B L D` cut to the longest real prompt, and its mask, or None if nothing is left to mask.

    `alone` says that the text is attended to by itself; then a prompt without a real token counts as wholly real, as
    in the published models.
    """
    if mask is None:
        return text, None
    mask = mask.bool()
    if alone:
        mask = mask | ~mask.any(dim=1, keepdim=True)
    length = max(1, int(mask.any(dim=0).nonzero().amax()) + 1 if bool(mask.any()) else 1)
    text, mask = text[:, :length], mask[:, :length]
    return text, None if bool(mask.all()) else mask


def check_heads(heads: int, head_dim: int, parts: Sequence[int]) -> None:
    """Raise UsageError for heads that cannot be rotated."""
    if heads < 1 or sum(parts) != head_dim or any(part % 2 or part < 2 for part in parts):
        raise UsageError(
            f"head_dim={head_dim} (heads={heads}) cannot be split into even parts for each axis of the grid"
        )


def _shape(x: Tensor) -> str:
    return f"of shape {' '.join(map(str, x.shape))}"
