"""Pixels <-> latents: the wavelet, causal layers and the VAE family."""

from osp.vae.posterior import GaussianPosterior
from osp.vae.wfvae import WFVAE, WFVAEConfig

__all__ = ["WFVAE", "GaussianPosterior", "WFVAEConfig"]
