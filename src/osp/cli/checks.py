"""What a verb checks of its settings and its model before anything else happens."""

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from osp.data.datamodule import ClipDataModule
from osp.errors import UsageError
from osp.training.checkpoints import load_vae
from osp.vae import LatentCodec, VideoVAE

log = logging.getLogger(__name__)

CLIP = {"clip.frames": 1, "clip.height": 1, "clip.width": 1, "clip.stride": 1}


def check_numbers(cfg: DictConfig, least: Mapping[str, float], optional: Collection[str] = ()) -> None:
    """Check numbers against the least value of each, whole numbers where that is an `int`; `optional` ones may be null.

    Raises UsageError naming the key and the value.
    """
    for key, bound in least.items():
        value = OmegaConf.select(cfg, key)
        if value is None and key in optional:
            continue
        whole = isinstance(bound, int)
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not value >= bound:
            given = "null" if value is None else value
            raise UsageError(
                f"{key}={given} makes no sense; it must be a {'whole ' if whole else ''}number of at least {bound}"
            )


def check_vae_source(cfg: DictConfig) -> None:
    """Raise UsageError if a configuration with `vae` says no file or folder to read it from."""
    if cfg.vae.get("path", "") is None:
        raise UsageError(
            "give checkpoint=FILE of `osp train`, vae=pretrained path=FOLDER of `osp import-weights`, "
            "or vae=published vae.kind=KIND vae.source=FILE"
        )


def build_vae(cfg: DictConfig) -> VideoVAE:
    """The VAE of a configuration `vae`. Raises UsageError if that gives another model, as a folder with weights may."""
    vae = instantiate(cfg)
    if not isinstance(vae, VideoVAE):
        raise UsageError(f"vae is a {type(vae).__name__}, which is no VAE; give weights of a VAE")
    return vae


SCALING_CLIPS = 32
"""Training clips over which the scaling of a VAE without a known one is measured."""


def codec_of(cfg: DictConfig, data: ClipDataModule) -> dict[str, Any]:
    """The arguments `codec` and `scaling_clips` of a module that works on latents; nothing for another.

    Features bring the scaling and say where their VAE was read from; if it is not there, it is not needed. Raises
    UsageError where videos have to be encoded and there is no VAE with weights.
    """
    if "denoiser" not in cfg.module:
        return {}
    features = getattr(data.train_source, "identity", None)
    vae = None
    if cfg.vae.get("path", cfg.vae.get("source")) is not None:
        vae = build_vae(cfg.vae)
    elif features is not None and cfg.logged_clips:
        vae = _vae_of_features(data.train_source)
    if vae is None:
        return {"codec": None}
    if features is not None:
        return {"codec": LatentCodec(vae, features.shift, features.scale)}
    scaling = cfg.latent.shift, cfg.latent.scale
    if scaling == (None, None) and vae.scaling is None:
        return {"codec": LatentCodec(vae, 0.0, 1.0), "scaling_clips": SCALING_CLIPS}
    return {"codec": instantiate(cfg.latent, vae=vae)}


def _vae_of_features(source: Any) -> VideoVAE | None:
    """The VAE that made features, to show clips; None, and a log line, if it is not where it was."""
    origin = source.vae_origin
    if origin is None or not Path(origin).exists():
        log.info(
            "no clips are shown: the VAE of %s is not at %s; give vae=trained checkpoint=FILE", source.path, origin
        )
        return None
    vae = load_vae(origin)
    if LatentCodec(vae, 0.0, 1.0).fingerprint() != source.identity.vae_fingerprint:
        log.warning("no clips are shown: %s holds another VAE than the one that made %s", origin, source.path)
        return None
    return vae
