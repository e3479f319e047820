"""What may befall a run: the disk is full, a checkpoint is cut short, a shard is gone. One line, and it goes on."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from osp.data.shards.build import write_rendered
from osp.training.state import open_state
from osp.training.vae_module import VAEModule

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from flaky_server import FlakyServer

Osp = Callable[..., tuple[int, str, str]]

TINY = [
    *("experiment=wfvae_tiny", "debug=limit", "data.workers=0", "data.batch_size=2", "logger=[]", "logged_clips=0"),
    *("vae.base_channels=4", "vae.latent_channels=4", "vae.encoder_flow_channels=4", "vae.decoder_flow_channels=4"),
    *("clip.frames=5", "clip.height=16", "clip.width=16", "module.decay_until=null", "trainer=cpu"),
    *("trainer.max_steps=2", "checkpoint_every=1"),
]
CHECKPOINT = 2_400_000  # bytes, somewhat more than it takes


def told(said: str) -> str:
    """The line that a command that failed ends with; there is no traceback."""
    assert "Traceback" not in said
    *_, line = said.splitlines()
    assert line.startswith("osp train: ")
    return line


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The VAE's weights, in memory of their own."""
    return {key: value.clone() for key, value in open_state(checkpoint).stored("vae.").items()}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """small_disk(bytes) -> a folder that holds so much, more than before; the test is skipped where none can be had."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def sized(size: int) -> Path:
        again = "remount," if os.path.ismount(folder) else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{again}size={size}", "tmpfs", str(folder)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no file system can be mounted here ({error})")
        return folder

    yield sized
    if os.path.ismount(folder):
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("form", ["file", "folder"])
def test_a_full_disk_and_a_checkpoint_that_is_cut_short_are_one_line_each_and_the_run_goes_on(
    small_disk: Callable[[int], Path], osp: Osp, form: str
) -> None:
    run = small_disk(CHECKPOINT + 500_000) / "run"
    command = ["train", *TINY, f"output={run}", f"checkpoint_form={form}", "checkpoint_keep=2"]
    held, last = run / "checkpoints", run / "checkpoints" / "last.ckpt"
    code, _, said = osp(*command)
    assert code == 1
    assert re.search(
        r"/\w+\.ckpt: cannot be written \(No space left on device\).*; make room, and run the same", told(said)
    )
    assert [path.name for path in held.iterdir()] == ["last.ckpt"]  # nothing half-written is left
    assert open_state(last).step == 1

    small_disk(6 * CHECKPOINT)
    code, out, said = osp(*command)
    assert (code, f"continuing from step 1 of {last}" in said) == (0, True)
    whole, weights = json.loads(out.splitlines()[-1]), weights_of(last)
    assert sorted(path.name for path in held.iterdir()) == ["best.ckpt", "last.ckpt", "step-00000001.ckpt"]

    piece = last if form == "file" else last / "rank-00000.safetensors"
    os.truncate(piece, piece.stat().st_size // 2)
    (held / "best.ckpt").rename(run / "best.ckpt")
    code, _, said = osp(*command)
    assert code == 1
    assert str(piece) in told(said)
    mend = "delete last.ckpt and give a copy of step-00000001.ckpt its name to go on from step 1"
    assert told(said).endswith(f"; {mend}, or resume=false starts over")
    if form == "folder":
        shutil.rmtree(last)
    (held / "step-00000001.ckpt").replace(last)
    code, out, said = osp(*command)
    assert (code, f"continuing from step 1 of {last}" in said) == (0, True)
    again = json.loads(out.splitlines()[-1])
    assert (again["steps"], again["val/psnr"]) == (2, whole["val/psnr"])
    assert weights
    for key, value in weights_of(last).items():
        assert torch.equal(value, weights[key])


def loses(shard: Path, at: int) -> Any:
    """A step of training before which a shard goes, also out of the cache, once the run has come so far."""
    step = VAEModule.training_step

    def training_step(self: VAEModule, *arguments: Any) -> Any:
        if self.global_step == at and shard.exists():
            shard.rename(shard.with_suffix(".away"))
            for copy in Path("cache").rglob("*.tar"):
                copy.unlink()
        return step(self, *arguments)

    return training_step


@pytest.mark.parametrize("data", ["shards", "stream"])
def test_a_shard_that_goes_during_a_run_is_one_line_and_the_run_goes_on_when_it_is_back(
    tmp_path: Path, osp: Osp, monkeypatch: pytest.MonkeyPatch, data: str
) -> None:
    served, shard = tmp_path / "served", tmp_path / "served" / "shard-000001.tar"
    draw = torch.Generator().manual_seed(0)
    videos = [torch.randint(256, (3, 5, 16, 16), generator=draw, dtype=torch.uint8) for _ in range(4)]
    write_rendered([(f"{n}", video, {"fps": 8.0}) for n, video in enumerate(videos)], served, shard_clips=2)
    with FlakyServer(served, 0) as server:
        where = [f"data.train.path={served}"]
        if data == "stream":
            where = [f"data.train.path.urls={server.url}", "data.train.path.cache=cache", "data.train.path.buffer=1"]
            where += ["data.train.path.slots=1", "data.train.path.lanes=1", "data.train.path.pause=0.01"]
        command = ["train", *TINY, f"data={data}", *where, "trainer.max_steps=8", "trainer.val_check_interval=8"]
        monkeypatch.setattr(VAEModule, "training_step", loses(shard, at=1))
        code, _, said = osp(*command, "output=run")
        assert code == 1
        assert re.search(rf"{shard.name}: (cannot be opened \(No such file|status 404 Not Found)", told(said))
        step = open_state(Path("run/checkpoints/last.ckpt")).step
        assert 1 <= step < 8
        shard.with_suffix(".away").rename(shard)
        code, out, said = osp(*command, "output=run")
        assert (code, f"continuing from step {step} of" in said) == (0, True), said
        assert json.loads(out.splitlines()[-1])["steps"] == 8
