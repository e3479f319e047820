"""Latents -> prediction: attention patterns, and the transformers that follow a schedule of them."""

from osp.denoiser.cross import CrossTransformer, CrossTransformerConfig
from osp.denoiser.denoiser import Denoiser
from osp.denoiser.grid import Grid
from osp.denoiser.joint import JointTransformer, JointTransformerConfig
from osp.denoiser.latte import LatteTransformer, LatteTransformerConfig
from osp.denoiser.restage import restage
from osp.denoiser.schedule import Stage

__all__ = [
    "CrossTransformer",
    "CrossTransformerConfig",
    "Denoiser",
    "Grid",
    "JointTransformer",
    "JointTransformerConfig",
    "LatteTransformer",
    "LatteTransformerConfig",
    "Stage",
    "restage",
]
