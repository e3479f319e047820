"""The clips that an evaluation reads, with its progress, and the name of what it evaluates."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig
from torch import Tensor

from osp.data.media.video import ClipError
from osp.data.sources import ClipSource
from osp.report.progress import shown_progress
from osp.training.runs import TrainingRun

Clip = TypeVar("Clip")


def read_clips(source: ClipSource, count: int) -> Iterator[Mapping[str, Any] | ClipError]:
    """The first so many clips of a source, or the error of one that cannot be read; shows how far it is."""
    with shown_progress("osp eval") as tell:
        for index in range(count):
            tell(index, count)
            try:
                clip: Mapping[str, Any] = source.read(index, 0)
            except ClipError as error:
                yield error
                continue
            if "pieces" in clip:
                clip = {**clip, "pieces": _told(clip, partial(_tell_part, tell, index, count))}
            yield clip


def counted(clips: Iterator[Clip], count: int) -> Iterator[Clip]:
    """The same clips, of which there are so many; shows how far it is."""
    with shown_progress("osp eval") as tell:
        for index, clip in enumerate(clips):
            tell(index, count)
            yield clip


def _told(clip: Mapping[str, Any], tell: Callable[[float], None]) -> Iterator[Tensor]:
    done = 0
    for piece in clip["pieces"]:
        yield piece
        done += piece.shape[1]
        tell(min(1.0, done / clip["expected"]))


def _tell_part(tell: Callable[[float, float], None], index: int, count: int, part: float) -> None:
    tell(index + part, count)


def model_name(cfg: DictConfig) -> str:
    """The model's name in results: the run that trained it and the checkpoint, or the kind and file of a VAE."""
    if cfg.checkpoint is None:
        origin = cfg.vae.get("path") or cfg.vae.get("source") or ""
        return f"{cfg.vae.get('kind', 'VAE')} {Path(str(origin)).name}".strip()
    trained_by = TrainingRun.of_checkpoint(cfg.checkpoint).name()
    return " ".join(filter(None, (trained_by, Path(cfg.checkpoint).stem)))
