"""Attention patterns, and how far apart they leave two tokens."""

from osp.denoiser.patterns.arrangement import (
    Dense,
    GroupSkip,
    GroupSkip2D,
    Pattern,
    SingleSkip,
    SingleSkip2D,
    Spatial,
    Temporal,
    Window,
)

__all__ = [
    "Dense",
    "GroupSkip",
    "GroupSkip2D",
    "Pattern",
    "SingleSkip",
    "SingleSkip2D",
    "Spatial",
    "Temporal",
    "Window",
]
