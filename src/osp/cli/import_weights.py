"""`osp import-weights`: published weights -> a folder of ours."""

from pathlib import Path
from typing import Any

from hydra.utils import to_absolute_path
from omegaconf import DictConfig, OmegaConf

from osp.errors import UsageError
from osp.weights.folders import read_json
from osp.weights.pretrained import save_pretrained
from osp.weights.published import Opened, open_published
from osp.weights.releases import import_release


def run(cfg: DictConfig) -> dict[str, Any]:
    """Read, check and write the weights; gives what the output folder holds.

    Raises UsageError for a bad `config`, and unless there is either a `kind` or a `release`.
    """
    if (cfg.kind is None) == (cfg.release is None):
        raise UsageError(
            "give kind=KIND for one model, or release=NAME for a released denoiser with its VAE (not both)"
        )
    return _model(cfg) if cfg.release is None else _release(cfg)


def _release(cfg: DictConfig) -> dict[str, Any]:
    if cfg.config is not None:
        raise UsageError("config: is for kind=KIND; of a release each part has a config.json of its own")
    source, output = to_absolute_path(str(cfg.source)), Path(to_absolute_path(str(cfg.output)))
    opened = import_release(cfg.release, source, output, cfg.dtype, cfg.folders)
    parts = {part: _said(one) for part, one in opened.items()}
    return {"output": str(output), "release": cfg.release, **parts}


def _model(cfg: DictConfig) -> dict[str, Any]:
    source, config = to_absolute_path(str(cfg.source)), _published_settings(cfg.config)
    opened = open_published(cfg.kind, source, config, cfg.dtype)
    output = Path(to_absolute_path(str(cfg.output)))
    save_pretrained(opened.model, output, opened.further_settings, opened.weights)
    return {"output": str(output), "kind": cfg.kind, **_said(opened)}


def _said(opened: Opened) -> dict[str, Any]:
    return {
        "parameters": sum(parameter.numel() for parameter in opened.model.parameters()),
        "settings": opened.model.settings,
        "published": opened.further_settings,
    }


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
