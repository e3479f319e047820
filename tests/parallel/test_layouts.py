"""Training in several processes: the same losses and weights in every layout as in one process."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from processes import Processes

from osp.conditioning import WordText
from osp.data.datamodule import ClipDataModule
from osp.data.media.video import to_float
from osp.data.sources import SyntheticClips
from osp.denoiser import CrossTransformer
from osp.diffusion import Flow
from osp.parallel import ReplicatedStrategy, ShardedStrategy, local, whole
from osp.training import vae_module
from osp.training.checkpoint_io import AtomicCheckpointIO
from osp.training.denoiser_module import DenoiserModule
from osp.training.discriminator import PatchDiscriminator3d
from osp.training.losses import VAELoss
from osp.training.module import TrainingModule
from osp.training.saving import LastCheckpoint
from osp.training.vae_module import VAEModule
from osp.vae import WFVAE, LatentCodec

CLIPS, STEPS = 4, 20  # clips in a step of all processes
TINY = {"latent_channels": 4, "base_channels": 4, "encoder_flow_channels": 4, "decoder_flow_channels": 4}
LAYOUTS = {
    "ddp": lambda: ReplicatedStrategy(),
    "fsdp": lambda: ShardedStrategy(),
    "hybrid": lambda: ShardedStrategy(replicas=2),
    "gathered": lambda: ShardedStrategy(reshard_after_forward=False, prefetch=2, offload_optimizer=True),
}


@contextmanager
def in_double(wanted: bool) -> Iterator[None]:
    """Weights and clips are double, or Adam would make steps of the rounding of gradients that are zero."""
    before = torch.get_default_dtype(), vae_module.to_float
    if wanted:
        torch.set_default_dtype(torch.float64)
        vae_module.to_float = lambda video: to_float(video).double()
    try:
        yield
    finally:
        torch.set_default_dtype(before[0])
        vae_module.to_float = before[1]


def new_vae() -> WFVAE:
    return WFVAE(**TINY, encoder_blocks=1, decoder_blocks=1, attention=False)


def new_module(kind: str) -> TrainingModule:
    """One whose trained models have no memory yet."""
    torch.manual_seed(3)
    if kind == "vae":
        with torch.device("meta"):
            vae, discriminator = new_vae(), PatchDiscriminator3d(width=4, layers=2, dropout=0.0)
        rates = {"lr": 1e-3, "discriminator_lr": 1e-3, "discriminator_start": 2, "ema_decay": 0.9}
        return VAEModule(vae, VAELoss(), discriminator=discriminator, **rates)
    codec = LatentCodec(new_vae(), 0.0, 1.0)
    with torch.device("meta"):
        text = WordText(channels=8, pooled_channels=None, layers=2, heads=2)
        sizes = {"channels": 4, "out_channels": 4, "heads": 2, "head_dim": 12, "text_channels": 8}
        denoiser = CrossTransformer(stages=[{"blocks": 1}, {"blocks": 2, "pattern": "skiparse", "k": 2}], **sizes)
    rates = {"lr": 1e-2, "ema_decay": 0.9, "recompute_every": 2}
    return DenoiserModule(denoiser, text, Flow(shift=1.0), codec=codec, **rates)


class Losses(Callback):
    """Remembers the loss of each step."""

    def __init__(self) -> None:
        self.all: list[float] = []

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any) -> None:
        self.all.append(trainer.callback_metrics["train/loss"].item())


def trained(kind: str, layout: str | None, clips: int, steps: int, folder: Path) -> dict[str, Any]:
    """Losses, outcome of the validation, and all weights at the end, of one process of a run."""
    warnings.filterwarnings("ignore")
    losses = Losses()
    source = SyntheticClips(8, 5, 32, 32, seed=0)
    data = ClipDataModule(source, SyntheticClips(4, 5, 32, 32, seed=1), batch_size=clips, val_batch_size=2)
    many = {} if layout is None else {"strategy": LAYOUTS[layout](), "devices": int(os.environ["WORLD_SIZE"])}
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[losses, LastCheckpoint(folder, 10)],
        plugins=[AtomicCheckpointIO()],
        default_root_dir=folder,
        **many,
    )
    with in_double(kind == "vae"):
        module = new_module(kind)
        trainer.fit(module, data)
    values = {key: value for key, value in module.state_dict().items() if isinstance(value, torch.Tensor)}
    return {
        "losses": losses.all,
        "score": trainer.callback_metrics[module.monitor].item(),
        "weights": {key: whole(value).clone() for key, value in values.items()},
        "held": sum(local(value).numel() for value in module.parameters()),
        "all": sum(value.numel() for value in module.parameters()),
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The runs of one process."""
    folder = tmp_path_factory.mktemp("alone")
    return {kind: trained(kind, None, CLIPS, STEPS, folder / kind) for kind in ("denoiser", "vae")}


@pytest.mark.parametrize(
    ("kind", "layout", "count"),
    [
        *(("denoiser", "fsdp", 2), ("denoiser", "hybrid", 4), ("denoiser", "gathered", 2)),
        *(("vae", "ddp", 2), ("vae", "fsdp", 2)),
    ],
)
def test_a_run_is_that_of_one_process(
    processes: Processes, alone: dict[str, dict[str, Any]], tmp_path: Path, kind: str, layout: str, count: int
) -> None:
    ran = processes.run(count, trained, kind, layout, CLIPS // count, STEPS, tmp_path, group=False)
    one = alone[kind]
    for run in ran:
        assert run["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert run["score"] == pytest.approx(one["score"], rel=1e-5)
        assert run["held"] == run["all"] if layout == "ddp" else run["held"] < 0.51 * run["all"]
    for key, value in one["weights"].items() if kind == "vae" else ():  # keys' biases have no gradient but rounding
        assert torch.allclose(ran[0]["weights"][key], value, atol=1e-6), key
