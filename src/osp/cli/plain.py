"""What the rooms below the command line are given in place of a configuration."""

from typing import Any

from omegaconf import DictConfig, OmegaConf


def plain(config: DictConfig, *, resolve: bool = True) -> dict[str, Any]:
    """A configuration as plain values, its references followed unless `resolve` is false."""
    values = OmegaConf.to_container(config, resolve=resolve)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}
