"""Training checkpoints: written whole or not at all, and read back as a model."""

import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from osp.conditioning import TextEncoder, WordText
from osp.denoiser import CrossTransformer, Denoiser, JointTransformer
from osp.diffusion import Epsilon, Flow, Objective, Velocity
from osp.errors import DataError, OspError, UsageError
from osp.sampling import VideoGenerator
from osp.training.encode_features import text_identities
from osp.vae import WFVAE, LatentCodec, VideoVAE
from osp.weights import load_pretrained
from osp.weights.files import load_exactly, open_checkpoint

_DENOISERS: dict[str, type[Denoiser]] = {kind.__name__: kind for kind in (CrossTransformer, JointTransformer)}
_OBJECTIVES: dict[str, type[Objective]] = {kind.__name__: kind for kind in (Epsilon, Velocity, Flow)}

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


class LastCheckpoint(Checkpoint):
    """Keeps the newest state in `folder/last.ckpt`: every `every_n_steps` steps and at the last one.

    Where a validation is due at the same step it is saved after it, with its outcome; put it behind the callback that
    keeps the best. Lightning's ModelCheckpoint guesses at what it saves under manual optimisation; this one saves what
    there is. Raises UsageError for less than one step.
    """

    def __init__(self, folder: str | Path, every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise UsageError(f"checkpoint_every={every_n_steps} is too small; it must be at least 1 step")
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


def averaged_weights(checkpoint: Mapping[str, Any], part: str = "") -> dict[str, Tensor]:
    """The averaged weights of a training checkpoint, or those of one part of what was trained."""
    prefix = f"ema.model.{part}"
    stored = checkpoint["state_dict"]
    # Copied: those of `open_checkpoint` lie in the file, which may be replaced.
    return {key.removeprefix(prefix): value.clone() for key, value in stored.items() if key.startswith(prefix)}


def load_trained_vae(path: str | Path) -> WFVAE:
    """The VAE of a training checkpoint, with its averaged weights, in eval mode.

    Raises WeightImportError for a file that is not a readable checkpoint and DataError for one that holds no VAE.
    """
    checkpoint = open_checkpoint(path)
    settings = checkpoint.get("vae_settings")
    if settings is None:
        raise DataError(f"{path}: holds no VAE trained here; a checkpoint of `osp train` is needed")
    vae = WFVAE(**settings)
    load_exactly(vae, averaged_weights(checkpoint), path)
    vae.origin = str(path)
    return vae.eval()


def load_vae(origin: str | Path) -> VideoVAE:
    """The VAE of a training checkpoint (a file) or of `osp import-weights` (a folder), in eval mode.

    Raises WeightImportError or DataError for anything else.
    """
    if not Path(origin).is_dir():
        return load_trained_vae(origin)
    vae = load_pretrained(origin)
    if not isinstance(vae, VideoVAE):
        raise DataError(f"{origin}: holds a {type(vae).__name__}, no VAE")
    return vae


def open_generator(path: str | Path) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """A denoiser's training checkpoint, and what it says of its generator.

    Raises WeightImportError for a file that is not a readable checkpoint and DataError for one without a denoiser.
    """
    checkpoint = open_checkpoint(path)
    entry = checkpoint.get("generator")
    if not isinstance(entry, dict):
        raise DataError(f"{path}: holds no denoiser trained here; a checkpoint of `osp train` with one is needed")
    return checkpoint, entry


def averaged_denoiser(checkpoint: Mapping[str, Any], path: str | Path) -> Denoiser:
    """The denoiser of a training checkpoint with its averaged weights, in eval mode."""
    entry = checkpoint["generator"]["denoiser"]
    with torch.device("meta"):
        denoiser = _DENOISERS[entry["model"]](**entry["settings"])
    load_exactly(denoiser, averaged_weights(checkpoint, "denoiser."), path)
    return denoiser.eval()


def averaged_text(checkpoint: Mapping[str, Any], path: str | Path) -> WordText | None:
    """The text encoder that was trained along, with its averaged weights, in eval mode; None if there is none."""
    entry = checkpoint["generator"]["text"]
    if entry["encoder"] != WordText.__name__:
        return None
    text = WordText(**entry["settings"])
    load_exactly(text, averaged_weights(checkpoint, "text."), path)
    return text.eval()


def load_trained_generator(
    path: str | Path, vae: VideoVAE | None = None, text: TextEncoder | None = None
) -> VideoGenerator:
    """What makes videos by a denoiser's training checkpoint, with averaged weights.

    `vae=None` reads the VAE from where it was read in training; `text=None` needs a text encoder that was trained
    along. Raises UsageError for a VAE or text encoder that is gone or is another than the one in training, and errors
    as `open_generator`.
    """
    checkpoint, entry = open_generator(path)
    latent, objective = entry["latent"], entry["objective"]
    if vae is None:
        vae = _stored_vae(path, latent["origin"])
    codec = LatentCodec(vae, latent["shift"], latent["scale"])
    if codec.fingerprint() != latent["vae_fingerprint"]:
        raise UsageError(
            f"{path}: was trained with another VAE ({latent['vae']} of {latent['origin']}) than {vae.origin}; "
            "give that one"
        )
    return VideoGenerator(
        averaged_denoiser(checkpoint, path),
        _text(checkpoint, path, text),
        _OBJECTIVES[objective["name"]](**objective["settings"]),
        codec,
        fps=entry["fps"],
        clip=entry["clip"],
    )


def _stored_vae(path: str | Path, origin: str | None) -> VideoVAE:
    if origin is None:
        raise UsageError(f"{path}: does not say where its VAE lies; give it as vae=...")
    if not Path(origin).exists():
        raise UsageError(f"{path}: its VAE, {origin}, is gone; give vae=...")
    try:
        return load_vae(origin)
    except OspError as error:
        raise UsageError(f"{path}: its VAE cannot be read back ({error}); give vae=...") from error


def _text(checkpoint: Mapping[str, Any], path: str | Path, text: TextEncoder | None) -> TextEncoder:
    trained = averaged_text(checkpoint, path)
    if trained is not None:
        if text is not None:
            raise UsageError(f"{path}: brings the text encoder that was trained along; leave text out")
        return trained
    made_by = checkpoint["generator"]["text"]["made_by"]
    names = " and ".join(f"{one['name']} ({one['width']} wide)" for one in made_by if one)
    if text is None:
        raise UsageError(f"{path}: was trained with texts of {names}, which it does not bring; give text=...")
    if [one and asdict(one) for one in text_identities(text)] != made_by:
        raise UsageError(f"{path}: was trained with texts of {names}, not of this {text.name}; give that encoder")
    return text
