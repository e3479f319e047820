"""Attention patterns, their names, and how far apart they leave two tokens."""

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
from osp.denoiser.patterns.distance import (
    average_attention_distance,
    blocks_from_each,
    blocks_until_reached,
    pairwise_distances,
)
from osp.denoiser.patterns.registry import pattern_names, register_pattern

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
    "average_attention_distance",
    "blocks_from_each",
    "blocks_until_reached",
    "pairwise_distances",
    "pattern_names",
    "register_pattern",
]
