"""Runs of several processes, started as a user starts them: in sweeps, by launchers, and how they all end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from osp.errors import UsageError
from osp.training.own_process import refuse_several_processes

TINY = [
    *("experiment=wfvae_tiny", "debug=limit", "data.workers=0", "data.batch_size=2", "logger=[]", "logged_clips=0"),
    *("vae.base_channels=4", "vae.latent_channels=4", "vae.encoder_flow_channels=4", "vae.decoder_flow_channels=4"),
    *("clip.frames=5", "clip.height=16", "clip.width=16", "module.decay_until=null", "trainer=ddp_cpu"),
]


def start(folder: Path, *arguments: str, **environ: str) -> "subprocess.Popen[str]":
    """`osp` in a group of processes of its own, as a shell starts it; its messages go to said.txt in the folder."""
    with open(folder / "said.txt", "a") as said:
        return subprocess.Popen(
            [sys.executable, "-m", "osp.cli", *arguments],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environ,
            stdout=said,
            stderr=said,
            text=True,
            start_new_session=True,
        )


def wait_for(happened: Callable[[], bool], running: "subprocess.Popen[str]", seconds: float = 250) -> None:
    limit = time.monotonic() + seconds
    while not happened():
        assert running.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.05)


def left_of(group: int) -> list[str]:
    """The processes of a group that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, fields = stat.read_text().rpartition(")")
        except OSError:  # it has just ended
            continue
        if fields.split()[2] == str(group) and fields.split()[0] not in "ZX":
            found.append(name)
    return found


def test_jobs_of_two_processes_do_not_replay_the_sweep_and_ctrl_c_ends_all_with_a_checkpoint(tmp_path: Path) -> None:
    steps = ["trainer.max_steps=2,100000", "trainer.val_check_interval=100", "checkpoint_every=1"]
    sweep = start(tmp_path, "train", "--multirun", *TINY, *steps, "output=sweep")
    last = tmp_path / "sweep" / "1" / "checkpoints" / "last.ckpt"
    try:
        wait_for(last.exists, sweep)
        os.killpg(sweep.pid, signal.SIGINT)  # as a terminal does it
        assert sweep.wait(60) == 130
        said = (tmp_path / "said.txt").read_text()
        assert not left_of(sweep.pid)
    finally:
        if left_of(sweep.pid):
            os.killpg(sweep.pid, signal.SIGKILL)
    assert said.count("the same command goes on from") == 1
    assert "Traceback" not in said
    assert said.count("Launching 2 jobs") == 1
    folders = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("config.yaml")}
    assert {one for one in folders if ".hydra" not in one} == {"sweep/0/config.yaml", "sweep/1/config.yaml"}
    assert json.loads((tmp_path / "sweep" / "0" / "result.json").read_text())["steps"] == 2
    assert not (tmp_path / "sweep" / "1" / "result.json").exists()
    table = (tmp_path / "sweep" / "comparison.csv").read_text().splitlines()
    assert len(table) == 2


@pytest.mark.parametrize(
    ("launcher", "environ"),
    [("torchrun", {"WORLD_SIZE": "2", "RANK": "1"}), ("srun", {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"})],
)
def test_a_sweep_in_several_processes_is_refused(launcher: str, environ: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=f"{launcher} has started it [24] times; leave {launcher} out"):
        refuse_several_processes("a sweep", environ)
    refuse_several_processes("a sweep", {"WORLD_SIZE": "1", "RANK": "0", "SLURM_NTASKS": "8"})
