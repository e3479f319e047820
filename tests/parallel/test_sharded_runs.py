"""A run goes on from its checkpoint in any layout: processes, strategies, and forms of the checkpoint."""

import os
import shutil
from pathlib import Path
from typing import Any

import lightning
import torch
from processes import Processes
from torch import Tensor

from osp.data.datamodule import ClipDataModule
from osp.data.sources import SyntheticClips
from osp.parallel import ReplicatedStrategy, ShardedStrategy
from osp.parallel.state import StateInParts
from osp.training.checkpoint_io import AtomicCheckpointIO
from osp.training.discriminator import PatchDiscriminator3d
from osp.training.losses import VAELoss
from osp.training.resumed import read_resumed
from osp.training.saving import LastCheckpoint
from osp.training.vae_module import VAEModule
from osp.vae import WFVAE
from osp.weights.lazy import Stored

TINY = {"latent_channels": 4, "base_channels": 4, "encoder_flow_channels": 4, "decoder_flow_channels": 4}


class Samples(lightning.Callback):
    """The clips of each step."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, list[int]]] = []

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Keep them."""
        self.seen.append((trainer.global_step, [n for one in batch for n in one["sample"].tolist()]))


def train(folder: str, layout: str, steps: int, resume: bool, saving: dict[str, Any]) -> list[tuple[int, list[int]]]:
    """A VAE with its discriminator, from step 2 on, up to a step; gives the clips that this process had."""
    torch.manual_seed(0)
    vae = WFVAE(**TINY, encoder_blocks=1, decoder_blocks=1, attention=False)
    discriminator = PatchDiscriminator3d(4, 2)
    strategy: Any = {"sharded": ShardedStrategy(), "replicated": ReplicatedStrategy(), "one": "auto"}[layout]
    samples, clips = Samples(), SyntheticClips(8, 5, 16, 16, seed=0)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy=strategy,
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[LastCheckpoint(folder, 1), samples],
        plugins=[AtomicCheckpointIO(**saving)],
    )
    module = VAEModule(
        vae,
        VAELoss(),
        discriminator=discriminator,
        discriminator_start=None,
        lr=1e-3,
        warmup_steps=3,
        gradient_clip=0.5,
    )
    data = ClipDataModule(clips, clips, batch_size=4 // trainer.world_size)
    trainer.fit(module, data, ckpt_path=Path(folder) / "last.ckpt" if resume else None, weights_only=True)
    assert isinstance(trainer.strategy, StateInParts) == (layout == "sharded")
    return samples.seen


def tensors(path: Path) -> dict[str, Tensor]:
    """All weights of a checkpoint."""
    found = read_resumed(path)["state_dict"]
    return {key: value.read() if isinstance(value, Stored) else value for key, value in found.items()}


def same(ours: Path, theirs: Path) -> bool:
    found, wanted = tensors(ours), tensors(theirs)
    return found.keys() == wanted.keys() and all(torch.equal(found[key], value) for key, value in wanted.items())


def test_a_sharded_run_repeats_an_uninterrupted_one_to_the_bit(processes: Processes, tmp_path: Path) -> None:
    seen = processes.run(2, train, str(tmp_path / "whole"), "sharded", 5, False, {}, group=False)
    folder = tmp_path / "whole" / "last.ckpt"
    assert sorted(path.name for path in folder.iterdir()) == [
        "index.json",
        "rank-00000.safetensors",
        "rank-00001.safetensors",
    ]
    assert max(path.stat().st_size for path in folder.iterdir()) < 0.7 * sum(
        path.stat().st_size for path in folder.iterdir()
    )
    place, saving = tmp_path / "kept", {"background": True, "keep": 2}
    first = processes.run(2, train, str(place), "sharded", 3, False, saving, group=False)
    then = processes.run(2, train, str(place), "sharded", 5, True, saving, group=False)
    assert [a + b for a, b in zip(first, then, strict=True)] == seen
    assert same(place / "last.ckpt", folder)
    assert {path.name for path in place.iterdir()} == {"last.ckpt", "step-00000004.ckpt"}


def test_any_layout_goes_on_from_a_folder_as_from_a_file(processes: Processes, tmp_path: Path) -> None:
    processes.run(2, train, str(tmp_path / "start"), "sharded", 3, False, {}, group=False)
    processes.run(2, train, str(tmp_path / "file"), "sharded", 3, False, {"form": "file"}, group=False)
    for count, layout in ((1, "one"), (2, "sharded")):
        for origin in ("start", "file"):
            place = tmp_path / f"{origin}-{layout}"
            shutil.copytree(tmp_path / origin, place)
            seen = processes.run(count, train, str(place), layout, 4, True, {}, group=False)
            assert [step for step, _ in seen[0]] == [3]
        assert same(tmp_path / f"start-{layout}" / "last.ckpt", tmp_path / f"file-{layout}" / "last.ckpt")
        assert (place / "last.ckpt").is_dir() == (layout == "sharded")
