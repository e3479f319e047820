"""What the command line asks of runs beyond `osp.training.runs`."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from osp.training.runs import RESULT, difference

__all__ = ["RESULT", "is_first_process", "other_setting", "plain"]


def is_first_process() -> bool:
    """Whether this is the run's first process, as far as its launcher has said yet."""
    from lightning.pytorch.utilities import rank_zero_only  # here: what only reads runs needs none of it

    return getattr(rank_zero_only, "rank", 0) == 0


def other_setting(before: Any, cfg: DictConfig) -> str | None:
    """Why a run with settings `before` cannot go on with those of `cfg`: "KEY=BEFORE, not NOW"; None if it can."""
    return difference(*(plain(config) for config in (before, cfg)))


def plain(config: Any) -> dict[str, Any]:
    """A configuration as plain values, its references followed."""
    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}
