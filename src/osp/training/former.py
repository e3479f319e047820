"""Configurations that an earlier version saved, in today's names, so that their runs go on: the one table of both."""

from typing import Any

from osp.denoiser import CrossTransformerConfig, JointTransformerConfig

_TARGETS = {
    "osp.data.features.FeatureClips": "osp.data.sources.FeatureClips",
    "osp.data.synthetic.SyntheticClips": "osp.data.sources.SyntheticClips",
}
# By today's target, since one former name stood for different things; checkpoints have the same
_KEYS = {
    "osp.denoiser.CrossTransformer": CrossTransformerConfig.former_names,
    "osp.denoiser.JointTransformer": JointTransformerConfig.former_names,
}


def renamed(config: Any) -> Any:
    """A configuration (plain values) with today's targets and keys; what has kept its name stays as it is."""
    if isinstance(config, list):
        return [renamed(value) for value in config]
    if not isinstance(config, dict):
        return config
    target = str(config.get("_target_"))
    target = _TARGETS.get(target, target)
    keys = _KEYS.get(target, {})
    new = {keys.get(key, key): renamed(value) for key, value in config.items()}
    return new | {"_target_": target} if "_target_" in config else new
