"""Rotary position embedding over frames, rows and columns (Su et al., arXiv:2104.09864)."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from osp.denoiser.grid import Grid
from osp.devices.kernels import are_fused

_BASE = 10000.0


@lru_cache(maxsize=8)  # a pair may take tens of megabytes on the device
def rotary_tables(
    parts: tuple[int, ...],
    grid: Grid,
    scale: tuple[float, ...],
    device: torch.device,
    dtype: torch.dtype,
    whole: bool = False,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines `N 1 D/2` for heads of which each axis of the grid has a part.

    Positions along an axis are divided by its `scale`, and then cut to whole numbers if they are to be `whole`. Cached
    by all of the arguments.
    """
    # A table made in inference mode could not serve a training step later.
    with torch.inference_mode(False), torch.no_grad():
        axes = [torch.arange(size, dtype=torch.float64, device=device) / s for size, s in zip(grid, scale, strict=True)]
        axes = [axis.floor() for axis in axes] if whole else axes
        positions = torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")])
        angles = []
        for part, position in zip(parts, positions, strict=True):
            steps = torch.arange(0, part, 2, dtype=torch.float64, device=device) / part
            angles.append(position[:, None] * _BASE**-steps)
        angle = torch.cat(angles, dim=1)[:, None]
        return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`B N H D`: rotate channel i with channel i + D/2, in the tables' precision."""
    if are_fused(x.device):
        from osp.devices.npu import fused_rotary  # here: it brings Lightning

        return fused_rotary(x, cos, sin)
    first, second = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def halves_first(parts: Sequence[int]) -> list[int]:
    """Where our channels are in heads that rotate half of each part with its other half, as the published ones do.

    We keep the first halves of all parts first, so that one rotation does for the whole head. Queries and keys in the
    same order give the same products.
    """
    firsts: list[int] = []
    seconds: list[int] = []
    start = 0
    for part in parts:
        firsts += range(start, start + part // 2)
        seconds += range(start + part // 2, start + part)
        start += part
    return firsts + seconds
