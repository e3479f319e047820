"""What every evaluation reads: clips, and the name of what it evaluates."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from osp.data.media.video import ClipError
from osp.data.sources import ClipSource
from osp.training.runs import TrainingRun


def read_clips(source: ClipSource, count: int) -> Iterator[Mapping[str, Any] | ClipError]:
    """The first so many clips of a source; of one that cannot be read, why."""
    for index in range(count):
        try:
            yield source.read(index, 0)
        except ClipError as error:
            yield error


def model_name(cfg: DictConfig) -> str:
    """What the results call the model: the run that trained it, or the file it came from."""
    if cfg.checkpoint is None:
        origin = cfg.vae.get("path") or cfg.vae.get("source") or ""
        return f"{cfg.vae.get('kind', 'VAE')} {Path(str(origin)).name}".strip()
    trained_by = TrainingRun.of_checkpoint(cfg.checkpoint).name()
    return " ".join(filter(None, (trained_by, Path(cfg.checkpoint).stem)))
