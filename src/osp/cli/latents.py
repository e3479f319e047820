"""What `osp train` encodes videos with, or shows those of features with."""

import logging
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from osp.cli.checks import build_vae, check_checkpoint
from osp.data.datamodule import ClipDataModule
from osp.data.features.format import FeatureIdentity
from osp.data.sources import ClipSource
from osp.training.checkpoints import load_vae
from osp.vae import LatentCodec, VideoVAE

log = logging.getLogger(__name__)

SCALING_CLIPS = 32
"""Training clips over which the scaling of a VAE without a known one is measured."""


def codec_of(cfg: DictConfig, data: ClipDataModule) -> dict[str, Any]:
    """The arguments `codec` and `scaling_clips` of a module that works on latents; nothing for another.

    Features bring the scaling and say where their VAE was read from; if it is not there, it is not needed. Raises
    UsageError where videos have to be encoded and there is no VAE with weights.
    """
    if "denoiser" not in cfg.module:
        return {}
    features = data.train_source.made_with
    vae = None
    if cfg.vae.get("path", cfg.vae.get("source")) is not None:
        check_checkpoint(cfg, cfg.vae)
        vae = build_vae(cfg.vae)
    elif features is not None and cfg.logged_clips:
        vae = _vae_of_features(data.train_source, features)
    if vae is None:
        return {"codec": None}
    if features is not None:
        return {"codec": LatentCodec(vae, features.shift, features.scale)}
    scaling = cfg.latent.shift, cfg.latent.scale
    if scaling == (None, None) and vae.scaling is None:
        return {"codec": LatentCodec(vae, 0.0, 1.0), "scaling_clips": SCALING_CLIPS}
    return {"codec": instantiate(cfg.latent, vae=vae)}


def _vae_of_features(source: ClipSource, features: FeatureIdentity) -> VideoVAE | None:
    """The VAE that made features, to show clips; None, and a log line, if it is not where it was."""
    origin = source.vae_origin
    if origin is None or not Path(origin).exists():
        where = "it does not say where its VAE lies" if origin is None else f"its VAE is not at {origin}"
        log.info("no clips are shown of %s: %s; give vae=trained checkpoint=FILE", source.path, where)
        return None
    vae = load_vae(origin)
    if LatentCodec(vae, 0.0, 1.0).fingerprint() != features.vae_fingerprint:
        log.warning("no clips are shown: %s holds another VAE than the one that made %s", origin, source.path)
        return None
    return vae
