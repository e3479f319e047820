"""Training checkpoints: when they are written, and whole or not at all; `osp.training.state` reads them."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import lightning
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from osp.checks import check_number
from osp.errors import DataError
from osp.files import sync
from osp.training.module import TrainingModule
from osp.training.resumed import read_resumed
from osp.training.state import BEST, LAST


class AtomicCheckpointIO(CheckpointIO):
    """Writes a checkpoint beside its place and renames it, so that whatever happens leaves the one before it whole.

    The file is written as the tensors come: there is no second copy of them, neither in memory nor in the system's
    temporary folder. Of what is read only those parts come out that a run goes on with (`osp.training.resumed`).
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write the checkpoint file at `path`. Raises DataError naming it if the disk does not take it."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        part.unlink(missing_ok=True)
        disk: _Disk | None = None
        try:
            with open(part, "xb") as file:  # no link that somebody put there is followed
                disk = _Disk(file)
                torch.save(checkpoint, cast(Any, disk))
                sync(file)
            os.replace(part, path)
        except BaseException as error:
            part.unlink(missing_ok=True)
            refused = error if isinstance(error, OSError) else disk.error if disk is not None else None
            if refused is None:
                raise
            before = "; the checkpoint before it is whole" if path.exists() else ""
            raise DataError(
                f"{path}: cannot be written ({refused.strerror}){before}; make room, and run the same command again"
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The parts of the checkpoint at `path` that a run goes on with, on the CPU."""
        return read_resumed(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint file; a folder is never deleted."""
        path = Path(path)
        if path.is_file() or path.is_symlink():
            path.unlink()


class _Disk:
    """A file for torch.save, which hides the reason of a failed write behind an error of its own."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def remove_parts(folders: Iterable[Path]) -> None:
    """Delete the half-written files that a killed run left in these folders."""
    for folder in folders:
        for pattern in (".*.part", "*.ckpt.tmp"):  # the latter as earlier versions called them
            for part in folder.glob(pattern):
                if part.is_file() or part.is_symlink():
                    part.unlink(missing_ok=True)


class BestCheckpoint(Checkpoint):
    """Keeps the state of the best validation in `folder/best.ckpt`, by the metric that the module names.

    Checkpoints hold the best score alone; where the file lies is known.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / BEST
        self.score: float | None = None

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save if this validation is better than all before."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        assert isinstance(pl_module, TrainingModule)
        metric = trainer.callback_metrics.get(pl_module.monitor)
        if metric is None:
            return
        score = float(metric)
        better = self.score is None or (score > self.score if pl_module.mode == "max" else score < self.score)
        if better:
            self.score = score
            trainer.save_checkpoint(self.path)

    def state_dict(self) -> dict[str, Any]:
        """The best score so far."""
        return {"score": self.score}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the best score over."""
        self.score = state_dict["score"]


class LastCheckpoint(Checkpoint):
    """Keeps the newest state in `folder/last.ckpt`: every `every_n_steps` steps and at the last one.

    Where a validation is due at the same step it is saved after it, with its outcome; put it behind the callback that
    keeps the best. Lightning's ModelCheckpoint guesses at what it saves under manual optimisation; this one saves what
    there is. Raises UsageError for less than one step.
    """

    def __init__(self, folder: str | Path, every_n_steps: int) -> None:
        check_number("checkpoint_every", every_n_steps, least=1, whole=True)
        self.path = Path(folder) / LAST
        self.every_n_steps = every_n_steps

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Save if it is time, unless a validation comes first."""
        if self._due(trainer) and not validates(trainer):
            trainer.save_checkpoint(self.path)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save if it is time."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and self._due(trainer):
            trainer.save_checkpoint(self.path)

    def _due(self, trainer: lightning.Trainer) -> bool:
        step = trainer.global_step
        return step > 0 and (step % self.every_n_steps == 0 or step == trainer.max_steps)


def validates(trainer: lightning.Trainer) -> bool:
    """Whether this step surely ends in a validation (counted in steps, not in epochs)."""
    every = trainer.val_check_batch
    return bool(
        trainer.enable_validation
        and trainer.check_val_every_n_epoch is None
        and isinstance(every, int)
        and trainer.global_step % every == 0
    )
