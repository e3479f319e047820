"""Plain values and built objects, which the rooms below the command line get in place of a configuration."""

from typing import Any

import hydra.utils
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from osp.configs.texts import escaped


def plain(config: DictConfig, *, resolve: bool = True) -> dict[str, Any]:
    """A configuration as plain values, its references followed unless `resolve` is false."""
    values = OmegaConf.to_container(config, resolve=resolve)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def configuration(values: Any) -> DictConfig:
    """The configuration of plain values, whose texts refer to nothing."""
    return OmegaConf.create(_escaped(values))


def instantiate(config: Any, **arguments: Any) -> Any:
    """The object that Hydra builds of a configuration; a text in which `${` stands for itself is kept too."""
    try:
        values = OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config
    except OmegaConfBaseException:  # Hydra says what is wrong, unless an argument takes its place
        return hydra.utils.instantiate(config, **arguments)
    if _has_references(values):  # Hydra resolves twice, so that the text would be taken for a reference
        config = OmegaConf.create(_escaped(_escaped(values)))
    return hydra.utils.instantiate(config, **arguments)


def _escaped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _escaped(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_escaped(inner) for inner in value]
    return escaped(value) if isinstance(value, str) else value


def _has_references(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_has_references, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and "${" in value
