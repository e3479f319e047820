"""Configurations that an earlier version saved, in today's names, so that their runs go on: the one table of both."""

from typing import Any

from osp.denoiser import CrossTransformerConfig, JointTransformerConfig

_TARGETS = {
    "osp.data.features.FeatureClips": "osp.data.sources.FeatureClips",
    "osp.data.synthetic.SyntheticClips": "osp.data.sources.SyntheticClips",
    "osp.training.discriminator.PatchDiscriminator3d": "osp.training.discriminator.PatchDiscriminator",
}
# Former keys by today's target, since one former name stood for different things; checkpoints hold the same keys.
_KEYS = {
    "osp.denoiser.CrossTransformer": CrossTransformerConfig.former_names,
    "osp.denoiser.JointTransformer": JointTransformerConfig.former_names,
}
# Former keys of a verb's command line alone.
_OF_VERBS = {("bench", "checkpoint_every"): "recompute_every"}


def new_key(verb: str, key: str) -> str | None:
    """Today's name of a former key of a verb's command line, for each family if they differ; None for another key."""
    part, _, name = key.rpartition(".")
    if part != "denoiser":
        return _OF_VERBS.get((verb, key))
    now = {target.rpartition(".")[2]: keys[name] for target, keys in _KEYS.items() if name in keys}
    return " or ".join(f"{part}.{new} of a {family}" for family, new in now.items()) or None


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
