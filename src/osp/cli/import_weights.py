"""`osp import-weights`: published weights -> a folder of ours."""

from pathlib import Path
from typing import Any

from hydra.utils import to_absolute_path
from omegaconf import DictConfig, OmegaConf

from osp.errors import UsageError
from osp.weights.folders import read_json
from osp.weights.pretrained import save_pretrained
from osp.weights.published import open_published
from osp.weights.releases import import_release


def run(cfg: DictConfig) -> dict[str, Any]:
    """Read, check and write the weights; gives what the output folder holds.

    Raises UsageError for a bad `config`, and unless there is either a `kind` or a `release`.
    """
    if (cfg.kind is None) == (cfg.release is None):
        raise UsageError(
            "give kind=KIND for one model, or release=NAME for a released denoiser with its VAE (not both)"
        )
    source, output, config = to_absolute_path(str(cfg.source)), to_absolute_path(str(cfg.output)), cfg.config
    if cfg.release is None:
        opened = open_published(cfg.kind, source, _published_settings(config), cfg.dtype)
        save_pretrained(opened.model, output, opened.further_settings, opened.weights)
        return {"output": output, "kind": cfg.kind, **opened.summary()}
    if config is not None:
        raise UsageError("config: is for kind=KIND; of a release each part has a config.json of its own")
    parts = import_release(cfg.release, source, output, cfg.dtype, cfg.folders)
    return {"output": output, "release": cfg.release} | {part: one.summary() for part, one in parts.items()}


def _published_settings(config: Any) -> dict[str, Any] | None:
    """The settings that `config` holds, or names the JSON file of."""
    if config is None:
        return None
    if isinstance(config, str):
        return read_json(Path(to_absolute_path(config)))
    settings = OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config
    if not isinstance(settings, dict):
        raise UsageError(f"config={settings}: must be a JSON file or {{key: value}}")
    return {str(key): value for key, value in settings.items()}
