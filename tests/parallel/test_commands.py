"""By the commands of a user: what four processes have trained in parts is exported, sampled, and trained further."""

import json
import logging
import os
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from processes import Processes

from osp.cli import main
from osp.vae import WFVAE
from osp.weights import save_pretrained

VAE = {"latent_channels": 4, "base_channels": 4, "level1": "2d", "encoder_blocks": 1, "decoder_blocks": 1}
TRAIN = [
    *("train", "experiment=t2v_tiny", "data=synthetic", "vae=pretrained", "latent.shift=0", "latent.scale=1"),
    *("clip.frames=5", "clip.height=16", "clip.width=16", "denoiser.channels=4", "denoiser.out_channels=4"),
    *("denoiser.heads=1", "denoiser.head_dim=12", "denoiser.text_channels=8", "text.channels=8", "text.heads=2"),
    *("text.layers=1", "denoiser.stages=[{blocks:1}]", "module.muon_lr=null", "module.decay_until=null"),
    *("data.batch_size=1", "data.workers=0", "data.val_clips=4", "global_batch=4", "logged_clips=0", "logger=[]"),
    *("trainer.val_check_interval=1", "checkpoint_every=1"),
]


def osp(*arguments: str) -> None:
    """Run a command in this process."""
    before, root = sys.argv, logging.getLogger()
    handlers, level = root.handlers[:], root.level
    sys.argv = ["osp", *arguments]
    try:
        main()
    finally:
        sys.argv, root.handlers[:] = before, handlers
        root.setLevel(level)


def osp_of_rank(*arguments: str) -> None:
    """The same in one of several processes, which torchrun would have told its rank before anything is imported."""
    rank_zero_only.rank = int(os.environ["RANK"])  # type: ignore[attr-defined]
    osp(*arguments)


def result(folder: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((folder / "result.json").read_text())
    return found


@pytest.mark.timeout(700)
def test_a_sharded_run_is_exported_sampled_and_trained_further(processes: Processes, tmp_path: Path) -> None:
    flows = {"encoder_flow_channels": 4, "decoder_flow_channels": 4}
    torch.manual_seed(0)
    save_pretrained(WFVAE(**VAE, **flows), tmp_path / "vae")
    train = [*TRAIN, f"path={tmp_path / 'vae'}"]
    four = [*train, "trainer=fsdp_cpu", "trainer.devices=4", "trainer.max_steps=1", f"output={tmp_path / 'run'}"]
    processes.run(4, osp_of_rank, *four, group=False)
    last, exported = tmp_path / "run" / "checkpoints" / "last.ckpt", tmp_path / "exported"
    assert len(list(last.glob("rank-*.safetensors"))) == 4

    osp("export", f"checkpoint={last}", f"output={exported}")
    videos = []
    for source in (last, exported):
        output = tmp_path / f"video-{source.name}"
        osp("sample", f"checkpoint={source}", "prompt=a red circle", "solver.steps=1", "device=cpu", f"output={output}")
        videos.append([file.read_bytes() for file in sorted(output.glob("*.mp4"))])
    assert len(videos[0]) == 1
    assert videos[0] == videos[1]

    one = [*train, "trainer=cpu"]
    osp(*one, "trainer.max_steps=2", f"output={tmp_path / 'run'}")
    assert result(tmp_path / "run")["steps"] == 2
    assert last.is_file()
    osp(*one, "trainer.max_steps=1", f"start_from={exported}", f"output={tmp_path / 'second'}")
    assert result(tmp_path / "second")["steps"] == 1
