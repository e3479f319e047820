"""Modules, clips and fits that take a second, for one device and for several."""

from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from osp.conditioning import WordText
from osp.data.datamodule import ClipDataModule
from osp.data.sources import SyntheticClips
from osp.denoiser import CrossTransformer
from osp.diffusion import Flow
from osp.training.checkpoint_io import AtomicCheckpointIO
from osp.training.denoiser_module import DenoiserModule
from osp.training.discriminator import PatchDiscriminator
from osp.training.losses import VAELoss
from osp.training.module import TrainingModule
from osp.training.saving import BestCheckpoint, LastCheckpoint
from osp.training.vae_module import VAEModule
from osp.vae import WFVAE, LatentCodec

SIZES = {"latent_channels": 4, "base_channels": 4, "encoder_flow_channels": 4, "decoder_flow_channels": 4}
CROSS = {"channels": 4, "out_channels": 4, "heads": 2, "head_dim": 12, "text_channels": 8, "stages": [{"blocks": 2}]}


def new_vae() -> WFVAE:
    """A VAE of random weights."""
    torch.manual_seed(3)
    return WFVAE(**SIZES, encoder_blocks=1, decoder_blocks=1, attention=False)


def new_denoiser() -> CrossTransformer:
    """A denoiser whose prediction is not zero."""
    torch.manual_seed(4)
    denoiser = CrossTransformer(**CROSS)
    for layer in (denoiser.out, *(block.text_out for block in denoiser.blocks)):
        torch.nn.init.normal_(layer.weight, std=0.3)
    return denoiser


def new_text() -> WordText:
    """A text encoder that trains along."""
    torch.manual_seed(5)
    return WordText(channels=8, pooled_channels=None, layers=1, heads=2)


def new_module(kind: str) -> TrainingModule:
    """`vae`, with a discriminator from step 1 on, or `denoiser`, on videos."""
    if kind == "vae":
        vae, discriminator = new_vae(), PatchDiscriminator(width=4, layers=2)
        return VAEModule(vae, VAELoss(), discriminator=discriminator, discriminator_start=1, lr=1e-3, ema_decay=0.9)
    codec = LatentCodec(new_vae(), [0.1] * 4, [2.0] * 4)
    return DenoiserModule(new_denoiser(), new_text(), Flow(shift=1.0), codec, lr=1e-3, ema_decay=0.9)


class Record(Callback):
    """Remembers the loss of each step, and where the weights were."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.devices: set[str] = set()

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Any, *_: Any) -> None:
        """One more step."""
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
        self.devices |= {str(parameter.device) for parameter in module.parameters()}


def fit(
    module: TrainingModule,
    folder: Path,
    steps: int,
    *,
    resume: Path | None = None,
    batch_size: int = 2,
    size: int = 16,
    **trainer: Any,
) -> Record:
    """Train to so many steps, with a checkpoint at every second one in the folder."""
    record = Record()
    clips = [SyntheticClips(8, 5, size, size, objects=1, plain=True, seed=seed) for seed in (0, 1)]
    data = ClipDataModule(clips[0], clips[1], batch_size=batch_size, val_clips=2)
    lightning.Trainer(
        **{
            "max_steps": steps,
            "max_epochs": -1,
            "val_check_interval": 2,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "callbacks": [record, BestCheckpoint(folder), LastCheckpoint(folder, 2)],
            "plugins": [AtomicCheckpointIO()],
        }
        | trainer
    ).fit(module, data, ckpt_path=resume, weights_only=True)
    return record
