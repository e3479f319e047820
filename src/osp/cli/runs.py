"""What the command line asks of runs beyond `osp.training.runs`."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from osp.training.runs import RESULT, difference, is_first_process

__all__ = ["RESULT", "is_first_process", "other_setting", "plain"]


def other_setting(before: Any, cfg: DictConfig) -> str | None:
    """Why a run with settings `before` cannot go on with those of `cfg`: "KEY=BEFORE, not NOW"; None if it can."""
    return difference(*(plain(config) for config in (before, cfg)))


def plain(config: Any) -> dict[str, Any]:
    """A configuration as plain values, its references followed."""
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}
