"""`osp export-weights`: a model of ours -> a folder for the published code."""

from pathlib import Path
from typing import Any

from hydra.utils import to_absolute_path
from omegaconf import DictConfig

from osp.training.checkpoints import load_trained_vae
from osp.weights.lazy import parse_dtype
from osp.weights.pretrained import load_pretrained, published_part
from osp.weights.published import save_published


def run(cfg: DictConfig) -> dict[str, Any]:
    """Write the model of a folder of `osp import-weights` or of a checkpoint; gives what the output folder holds."""
    source, output = (Path(to_absolute_path(str(path))) for path in (cfg.source, cfg.output))
    if source.is_dir():
        model, further_settings = load_pretrained(source, cfg.dtype), published_part(source)
    else:
        model, further_settings = load_trained_vae(source).to(parse_dtype(cfg.dtype)), {}
    settings = save_published(model, output, further_settings)
    return {
        "output": str(output),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "settings": settings,
    }
