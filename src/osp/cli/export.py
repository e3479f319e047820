"""`osp export`: what a run has trained -> a folder of weights."""

from typing import Any

from hydra.utils import to_absolute_path
from omegaconf import DictConfig

from osp.training.export import export


def run(cfg: DictConfig) -> dict[str, Any]:
    """Write the folder; gives what it holds."""
    source, output = (to_absolute_path(str(path)) for path in (cfg.checkpoint, cfg.output))
    return export(source, output, averaged=cfg.averaged, form=cfg.form, dtype=cfg.dtype)
