"""The codec that a run encodes its videos with, or shows the videos of features with."""

import logging
from collections.abc import Callable
from pathlib import Path

from osp.data.features.format import FeatureIdentity
from osp.data.sources import ClipSource
from osp.training.checkpoints import load_vae
from osp.vae import LatentCodec, VideoVAE

log = logging.getLogger(__name__)

SCALING_CLIPS = 32
"""Training clips over which the scaling of a VAE without a known one is measured."""


def codec_of(
    source: ClipSource,
    vae: VideoVAE | None,
    scaled: Callable[[VideoVAE], LatentCodec],
    *,
    is_scaling_given: bool,
    shows_clips: bool,
) -> tuple[LatentCodec | None, int]:
    """The codec for the clips of a source, and over how many of them its scaling is still to be measured.

    `vae` is the one that was asked for; without one, clips of features are shown with the VAE that made them, if it is
    where it was. `scaled` gives a VAE the scaling that was asked for. Features bring theirs.
    """
    features = source.made_with
    if vae is None and features is not None and shows_clips:
        vae = _vae_of_features(source, features)
    if vae is None:
        return None, 0
    if features is not None:
        return LatentCodec(vae, features.shift, features.scale), 0
    if not is_scaling_given and vae.scaling is None:
        return LatentCodec(vae, 0.0, 1.0), SCALING_CLIPS
    return scaled(vae), 0


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
