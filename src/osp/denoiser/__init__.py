"""Latents -> prediction: attention patterns, and the transformers that follow a schedule of them."""

from osp.denoiser.grid import Grid

__all__ = ["Grid"]
