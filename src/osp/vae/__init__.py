"""Pixels <-> latents: the wavelet, causal layers and the VAE family."""

from osp.vae.autoencoder import VideoVAE
from osp.vae.causalvae import CausalVAEConfig, CausalVideoVAE
from osp.vae.codec import LatentCodec, measure_scaling
from osp.vae.memory import fit_tiling
from osp.vae.posterior import GaussianPosterior
from osp.vae.streaming import stream_decode, stream_encode
from osp.vae.tiling import Tiling
from osp.vae.wfvae import WFVAE, WFVAEConfig

__all__ = [
    "WFVAE",
    "CausalVAEConfig",
    "CausalVideoVAE",
    "GaussianPosterior",
    "LatentCodec",
    "Tiling",
    "VideoVAE",
    "WFVAEConfig",
    "fit_tiling",
    "measure_scaling",
    "stream_decode",
    "stream_encode",
]
