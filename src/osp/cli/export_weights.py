"""`osp export-weights`: a model of ours -> a folder for the published code, as `osp export form=published`."""

from typing import Any

from hydra.utils import to_absolute_path
from omegaconf import DictConfig

from osp.training.export import export


def run(cfg: DictConfig) -> dict[str, Any]:
    """Write the folder; gives what it holds."""
    source, output = (to_absolute_path(str(path)) for path in (cfg.source, cfg.output))
    return export(source, output, form="published", dtype=cfg.dtype)
