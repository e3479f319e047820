"""Training checkpoints: written whole or not at all, and read back as a model."""

import os
from pathlib import Path
from typing import Any

import lightning
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback

from osp.errors import DataError, UsageError
from osp.vae import WFVAE
from osp.weights.files import read_checkpoint

LAST = "last.ckpt"
BEST = "best.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it, so that a killed run leaves the one before it whole.

    Lightning's own writer goes through the system's temporary folder, from where a move is a copy on most machines.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write the checkpoint file at `path`."""
        temporary = f"{path}.tmp"
        super().save_checkpoint(checkpoint, temporary, storage_options)
        os.replace(temporary, path)


class LastCheckpoint(Callback):
    """Keeps the newest state in `folder/last.ckpt`: every `every_n_steps` steps and at the last one.

    Lightning's ModelCheckpoint guesses at what it saves under manual optimisation; this one saves what there is.
    Raises UsageError for less than one step.
    """

    def __init__(self, folder: str | Path, every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise UsageError(f"checkpoint_every={every_n_steps} is too small; it must be at least 1 step")
        self.path = Path(folder) / LAST
        self.every_n_steps = every_n_steps

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Save if it is time."""
        step = trainer.global_step
        if step % self.every_n_steps == 0 or step == trainer.max_steps:
            trainer.save_checkpoint(self.path)


def load_trained_vae(path: str | Path) -> WFVAE:
    """The VAE of a training checkpoint, with its averaged weights, in eval mode.

    Raises WeightImportError for a file that is not a readable checkpoint and DataError for one that holds no VAE.
    """
    checkpoint = read_checkpoint(path)
    settings = checkpoint.get("vae_settings")
    if settings is None:
        raise DataError(f"{path}: holds no VAE trained here; a checkpoint of `osp train` is needed")
    vae = WFVAE(**settings)
    prefix = "ema.model."
    averaged = {key.removeprefix(prefix): v for key, v in checkpoint["state_dict"].items() if key.startswith(prefix)}
    vae.load_state_dict(averaged)
    return vae.eval()
