"""`osp export`: what a run has trained -> a folder of weights; and `osp export-weights`, in the published form."""

from typing import Any

from hydra.utils import to_absolute_path
from omegaconf import DictConfig

from osp.cli.printing import show
from osp.training.export import export


def run(cfg: DictConfig, **how: Any) -> dict[str, Any]:
    """Write the folder; gives what it holds, and prints the Python that loads a published form."""
    given = {key: cfg[key] for key in ("averaged", "form", "dtype", "kind") if key in cfg}
    source = cfg.checkpoint if "checkpoint" in cfg else cfg.source
    source, output = (to_absolute_path(str(path)) for path in (source, cfg.output))
    scaling_from = None if cfg.scaling_from is None else to_absolute_path(str(cfg.scaling_from))
    told = export(source, output, scaling_from=scaling_from, **given, **how)
    for line in told.get("load", ()):
        show(line)
    return told
