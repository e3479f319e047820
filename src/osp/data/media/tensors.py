"""Pixels as whole numbers, and as the numbers that models work on."""

import torch
from torch import Tensor


def to_float(video: Tensor) -> Tensor:
    """Float32 in [-1, 1] of uint8 0..255, any shape."""
    return video.to(torch.float32) / 127.5 - 1.0


def to_uint8(video: Tensor) -> Tensor:
    """uint8 0..255 (rounded) of float in [-1, 1] (clamped), any shape."""
    return ((video.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
