"""How much memory a VAE needs, found without computing anything, and the tiles that fit into a budget."""

import math
import re
from typing import get_args

import torch

from osp.devices.live import LiveBytes
from osp.errors import UsageError
from osp.vae.autoencoder import COLOURS, VideoVAE
from osp.vae.streaming import Half
from osp.vae.tiling import Tiling

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}

HALVES: tuple[Half, ...] = get_args(Half)

# Memory beyond the tensors: an allocator's unused parts, and the work space of convolutions.
_HEADROOM = 1.2


def parse_bytes(value: int | str) -> int:
    """`6GiB`, `800 MB` or a number of bytes -> bytes. Raises UsageError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?)B?", str(value).strip().upper())
    if match is None or match[2] not in _UNITS or float(match[1]) <= 0:
        raise UsageError(f"max_memory={value}: must be an amount of memory, for example 6GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def working_bytes(vae: VideoVAE, half: Half, height: int, width: int, dtype: torch.dtype = torch.float32) -> int:
    """The most bytes that one half of the VAE has in tensors, besides its weights, for frames of this size in pixels.

    That is for a clip of any length where that half streams, and for one of two latent frames where it does not.
    Convolutions are counted as on a GPU; those that slide on the CPU need less.
    """
    with torch.device("meta"), torch.no_grad():
        twin = type(vae)(**vae.settings).to(dtype)
        frames = vae.strides.pixel_frames(9 if vae.can_stream(half) else 2)
        with LiveBytes() as live:
            if half == "encoder":
                twin.encode(torch.empty(1, COLOURS, frames, height, width, dtype=dtype))
            else:
                size = vae.strides.latent(frames, height, width)
                twin.decode(torch.empty(1, vae.latent_channels, *size, dtype=dtype))
    return live.peak


def fit_tiling(
    vae: VideoVAE,
    height: int,
    width: int,
    max_memory: int | str,
    *,
    dtype: torch.dtype = torch.float32,
    overlap: int = 64,
) -> Tiling | None:
    """The largest tiles with which `encode` and `decode` of `height` x `width` frames stay within `max_memory`.

    `max_memory` is in bytes or like "6GiB". It holds the weights in `dtype` and what the VAE works with for one clip;
    the clip itself comes on top. None means that whole frames fit. Raises UsageError if not even the smallest tiles do.
    """
    vae.check_size(1, height, width)
    budget = parse_bytes(max_memory)
    weights = sum(tensor.numel() for tensor in vae.state_dict().values()) * dtype.itemsize

    def needed(side: int) -> int:
        size = (min(side, height), min(side, width))
        return weights + int(_HEADROOM * max(working_bytes(vae, half, *size, dtype) for half in HALVES))

    whole = max(height, width)
    if needed(whole) <= budget:
        return None
    step = 4 * vae.space_stride
    overlap = math.ceil(overlap / vae.space_stride) * vae.space_stride
    low, high = overlap + step, whole
    if high <= low or needed(low) > budget:
        least = min(low, whole)
        raise UsageError(
            f"max_memory={max_memory} is too little: for {least} pixels a side this VAE needs "
            f"{needed(least) / 2**30:.2f} GiB"
        )
    while high - low > step:  # low fits, high does not
        middle = (low + high) // 2 // step * step
        middle = middle if middle > low else low + step
        low, high = (middle, high) if needed(middle) <= budget else (low, middle)
    return Tiling(low, overlap)
