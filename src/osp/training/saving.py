"""When training checkpoints are written (`osp.training.checkpoint_io` writes them), and what a killed run leaves."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn

from osp.checks import check_number
from osp.files import discard, whole_at
from osp.training.checkpoint_io import finish_saving
from osp.training.module import TrainingModule
from osp.training.state import BEST, LAST


def remove_parts(folders: Iterable[Path]) -> None:
    """Delete the half-written checkpoints that a killed run left in these folders."""
    for folder in folders:
        for pattern in (".*.part", "*.ckpt.tmp"):  # the latter as earlier versions called them
            for part in folder.glob(pattern):
                if part.is_file() or part.is_symlink() or part.name.endswith((".ckpt.part", ".ckpt.before.part")):
                    discard(part)
        for aside in folder.glob(".*.ckpt.before"):  # it is read where the new one has not come to its place
            if whole_at(place := aside.with_name(aside.name[1:].removesuffix(".before"))) == place:
                discard(aside)


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

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Wait for a checkpoint that is still being written."""
        finish_saving(trainer)

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
