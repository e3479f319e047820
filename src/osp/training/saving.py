"""Training checkpoints: when they are written, and whole or not at all; `osp.training.state` reads them."""

import os
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from osp.checks import check_number
from osp.training.module import TrainingModule
from osp.training.state import BEST, LAST


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it, so that a killed run leaves the one before it whole.

    Lightning's own writer goes through the system's temporary folder, from where a move is a copy on most machines.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write the checkpoint file at `path`."""
        temporary = f"{path}.tmp"
        super().save_checkpoint(checkpoint, temporary, storage_options)
        os.replace(temporary, path)


class BestCheckpoint(ModelCheckpoint):
    """Keeps the state of the best validation in `folder/best.ckpt`, by the metric that the module names."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder, BEST.removesuffix(".ckpt"), enable_version_counter=False)

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Take over the module's metric, and which way it is better."""
        assert isinstance(pl_module, TrainingModule)
        self.monitor, self.mode = pl_module.monitor, pl_module.mode
        self.kth_value = torch.tensor(float("inf" if self.mode == "min" else "-inf"))
        super().setup(trainer, pl_module, stage)

    @property
    def state_key(self) -> str:
        """That of Lightning's class, under which earlier checkpoints hold what was best."""
        return super().state_key.replace(type(self).__name__, ModelCheckpoint.__name__, 1)


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
        if self._due(trainer) and not self._validates(trainer):
            trainer.save_checkpoint(self.path)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save if it is time."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and self._due(trainer):
            trainer.save_checkpoint(self.path)

    def _due(self, trainer: lightning.Trainer) -> bool:
        step = trainer.global_step
        return step > 0 and (step % self.every_n_steps == 0 or step == trainer.max_steps)

    def _validates(self, trainer: lightning.Trainer) -> bool:
        """Whether this step surely ends in a validation (counted in steps, not in epochs)."""
        every = trainer.val_check_batch
        return bool(
            trainer.enable_validation
            and trainer.check_val_every_n_epoch is None
            and isinstance(every, int)
            and trainer.global_step % every == 0
        )
