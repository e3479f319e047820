"""A run goes on from its checkpoint in any layout: processes, strategies, and forms of the checkpoint."""

import os
import shutil
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from processes import Processes
from torch import Tensor

from osp.conditioning import WordText
from osp.data.datamodule import ClipDataModule
from osp.data.sources import SyntheticClips
from osp.denoiser import CrossTransformer
from osp.diffusion import Flow
from osp.parallel import ShardedStrategy
from osp.parallel.state import StateInParts
from osp.training.checkpoint_io import AtomicCheckpointIO
from osp.training.clipping import AdaptiveClipping
from osp.training.denoiser_module import DenoiserModule
from osp.training.discriminator import PatchDiscriminator
from osp.training.losses import VAELoss
from osp.training.module import TrainingModule
from osp.training.resumed import read_resumed
from osp.training.saving import LastCheckpoint
from osp.training.vae_module import VAEModule
from osp.vae import WFVAE, LatentCodec
from osp.weights.lazy import Stored

TINY = {"latent_channels": 4, "base_channels": 4, "encoder_flow_channels": 4, "decoder_flow_channels": 4}


class Samples(lightning.Callback):
    """The clips of each step."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, list[int]]] = []

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Keep them."""
        self.seen.append((trainer.global_step, [n for one in batch for n in one["sample"].tolist()]))


def new_module(kind: str) -> TrainingModule:
    """One with two optimisers: a VAE with its discriminator, which takes part from step 1 on, or a denoiser by Muon."""
    torch.manual_seed(0)
    vae = WFVAE(**TINY, encoder_blocks=1, decoder_blocks=1, attention=False)
    if kind == "gan":
        return VAEModule(
            vae,
            VAELoss(),
            discriminator=PatchDiscriminator(4, 2),
            discriminator_start=1,
            lr=1e-3,
            warmup_steps=3,
            gradient_clip=0.5,
        )
    sizes = {"channels": 4, "out_channels": 4, "heads": 2, "head_dim": 12, "text_channels": 8}
    return DenoiserModule(
        CrossTransformer(stages=[{"blocks": 1}], **sizes),
        WordText(channels=8, pooled_channels=None, layers=1, heads=2),
        Flow(shift=1.0),
        codec=LatentCodec(vae, 0.0, 1.0),
        clipping=AdaptiveClipping(warmup=1, deviations=0.1),
        lr=1e-3,
        muon_lr=1e-3,
    )


def train(
    folder: str, kind: str, layout: str, steps: int, resume: bool, saving: dict[str, Any]
) -> list[tuple[int, list[int]]]:
    """Train up to a step; gives the clips that this process had."""
    strategy: Any = {"sharded": ShardedStrategy(), "one": "auto"}[layout]
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
    data = ClipDataModule(clips, clips, batch_size=4 // trainer.world_size)
    trainer.fit(new_module(kind), data, ckpt_path=Path(folder) / "last.ckpt" if resume else None, weights_only=True)
    assert isinstance(trainer.strategy, StateInParts) == (layout == "sharded")
    return samples.seen


def tensors(path: Path) -> dict[str, Tensor]:
    """All weights of a checkpoint in a folder, and the states of its optimisers."""
    read = read_resumed(path)
    found = {key: value for key, value in read["state_dict"].items() if isinstance(value, Stored | Tensor)}
    for number, optimizer in enumerate(read["optimizer_states"]):
        assert optimizer["state"]
        for parameter, values in optimizer["state"].items():
            found |= {f"{number} {parameter} {name}": value for name, value in values.items()}
    return {key: value.read() if isinstance(value, Stored) else value for key, value in found.items()}


def same(ours: Path, theirs: Path) -> bool:
    found, wanted = tensors(ours), tensors(theirs)
    return found.keys() == wanted.keys() and all(torch.equal(found[key], value) for key, value in wanted.items())


@pytest.mark.parametrize("kind", ["muon", "gan"])
def test_a_sharded_run_goes_on_to_the_bit_and_any_layout_from_a_folder_as_from_a_file(
    processes: Processes, tmp_path: Path, kind: str
) -> None:
    seen = processes.run(2, train, str(tmp_path / "whole"), kind, "sharded", 4, False, {}, group=False)
    folder = tmp_path / "whole" / "last.ckpt"
    assert len(read_resumed(folder)["optimizer_states"]) == 2
    assert sorted(path.name for path in folder.iterdir()) == [
        "index.json",
        "rank-00000.safetensors",
        "rank-00001.safetensors",
    ]
    assert max(path.stat().st_size for path in folder.iterdir()) < 0.7 * sum(
        path.stat().st_size for path in folder.iterdir()
    )
    place, saving = tmp_path / "kept", {"background": True, "keep": 2}
    first = processes.run(2, train, str(place), kind, "sharded", 2, False, saving, group=False)
    shutil.copytree(place, tmp_path / "folder-one")
    then = processes.run(2, train, str(place), kind, "sharded", 4, True, saving, group=False)
    assert [a + b for a, b in zip(first, then, strict=True)] == seen
    assert same(place / "last.ckpt", folder)
    assert {path.name for path in place.iterdir()} == {"last.ckpt", "step-00000003.ckpt"}
    if kind == "muon":
        return
    processes.run(2, train, str(tmp_path / "file"), kind, "sharded", 2, False, {"form": "file"}, group=False)
    shutil.copytree(tmp_path / "file", tmp_path / "file-one")
    processes.run(2, train, str(tmp_path / "file"), kind, "sharded", 4, True, {}, group=False)
    assert same(tmp_path / "file" / "last.ckpt", folder)
    for origin in ("folder-one", "file-one"):
        ((step, _),) = processes.run(1, train, str(tmp_path / origin), kind, "one", 3, True, {}, group=False)[0]
        assert step == 2
        assert (tmp_path / origin / "last.ckpt").is_file()
    assert same(tmp_path / "folder-one" / "last.ckpt", tmp_path / "file-one" / "last.ckpt")
