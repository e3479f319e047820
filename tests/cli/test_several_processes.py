"""Runs of several processes, started as a user starts them: in sweeps, by launchers, and how they all end."""

import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest

from osp.errors import UsageError
from osp.training.own_process import refuse_several_processes

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))  # here and in the processes that are started

from resume_starts import started

TINY = [
    *("experiment=wfvae_tiny", "debug=limit", "data.workers=0", "data.batch_size=2", "logger=[]", "logged_clips=0"),
    *("vae.base_channels=4", "vae.latent_channels=4", "vae.encoder_flow_channels=4", "vae.decoder_flow_channels=4"),
    *("clip.frames=5", "clip.height=16", "clip.width=16", "module.decay_until=null", "trainer=ddp_cpu"),
]


def wait_for(happened: Callable[[], bool], running: ForkServerProcess, seconds: float = 500) -> None:
    limit = time.monotonic() + seconds
    while not happened():
        assert running.is_alive()
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


@pytest.mark.timeout(700)
def test_jobs_of_two_processes_do_not_replay_the_sweep_and_ctrl_c_ends_all_with_a_checkpoint(tmp_path: Path) -> None:
    steps = ["trainer.max_steps=2,100000", "trainer.val_check_interval=100", "checkpoint_every=1"]
    arguments = ["train", "--multirun", *TINY, *steps, f"output={tmp_path / 'sweep'}"]
    sweep = started(arguments, {"OMP_NUM_THREADS": 1}, 0, tmp_path / "said.txt")
    group, last = sweep.pid or 0, tmp_path / "sweep" / "1" / "checkpoints" / "last.ckpt"
    try:
        wait_for(last.exists, sweep)
        os.killpg(group, signal.SIGINT)  # as a terminal does it
        sweep.join(60)
        assert sweep.exitcode == 130
        said = (tmp_path / "said.txt").read_text()
        assert not left_of(group)
    finally:
        if left_of(group):
            os.killpg(group, signal.SIGKILL)
    assert said.count("the same command goes on from") == 1
    assert "Traceback" not in said
    assert said.count("Launching 2 jobs") == 1
    folders = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("config.yaml")}
    assert {one for one in folders if ".hydra" not in one} == {"sweep/0/config.yaml", "sweep/1/config.yaml"}
    assert json.loads((tmp_path / "sweep" / "0" / "result.json").read_text())["steps"] == 2
    assert not (tmp_path / "sweep" / "1" / "result.json").exists()
    table = (tmp_path / "sweep" / "comparison.csv").read_text().splitlines()
    assert len(table) == 2


@pytest.mark.timeout(700)
def test_a_process_that_is_gone_before_all_have_met_ends_the_one_that_has_started_it(tmp_path: Path) -> None:
    # Lightning starts the second process by the name of the command, which is no file here: it ends without a word.
    first = started(["train", *TINY, f"output={tmp_path / 'run'}"], {}, 0, tmp_path / "said.txt")
    first.join(500)
    assert first.exitcode == 1
    (line,) = [one for one in (tmp_path / "said.txt").read_text().splitlines() if one.startswith("osp train: ")]
    assert re.search(r"rank 0 of 2 on .*: rank 1 \(.*\) is gone; it was last seen while it started", line)
    assert line.removeprefix("osp train: ") in (tmp_path / "run" / "train.log").read_text()


@pytest.mark.parametrize(
    ("launcher", "environ"),
    [("torchrun", {"WORLD_SIZE": "2", "RANK": "1"}), ("srun", {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"})],
)
def test_a_sweep_in_several_processes_is_refused(launcher: str, environ: dict[str, str]) -> None:
    with pytest.raises(UsageError, match=f"{launcher} has started it [24] times; leave {launcher} out"):
        refuse_several_processes("a sweep", environ)
    refuse_several_processes("a sweep", {"WORLD_SIZE": "1", "RANK": "0", "SLURM_NTASKS": "8"})


HANGS = """
import time

from lightning.pytorch.callbacks import Callback


class Hangs(Callback):
    def on_train_batch_start(self, trainer, *args):
        if trainer.global_rank == 1 and trainer.global_step == 3:
            time.sleep(1000)
"""


def tasks(folder: Path, count: int, *arguments: str) -> list[ForkServerProcess]:
    """The command in so many tasks of one node, with the variables that srun sets; messages go to RANK.txt."""
    step = {"STEP_ID": 0, "STEP_NUM_TASKS": count, "STEP_NUM_NODES": 1, "NTASKS": count, "NNODES": 1, "JOB_ID": 77}
    shared = {f"SLURM_{key}": value for key, value in (step | {"NODELIST": "127.0.0.1", "NODEID": 0}).items()}
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        shared["MASTER_PORT"] = server.getsockname()[1]
    return [
        started(arguments, shared | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}, rank, folder / f"{rank}.txt")
        for rank in range(count)
    ]


@pytest.mark.timeout(700)
def test_tasks_of_slurm_train_together_and_one_that_hangs_is_named_and_ends_them_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hangs.py").write_text(HANGS)
    monkeypatch.syspath_prepend(tmp_path)
    steps = ["trainer.max_steps=100", "trainer.val_check_interval=100", "checkpoint_every=2", "watchdog=5"]
    hangs = ["+callbacks.hangs._target_=hangs.Hangs", f"output={tmp_path / 'run'}"]
    running = tasks(tmp_path, 2, "train", *TINY, *steps, *hangs)
    try:
        for one in running:
            one.join(500)
        assert [one.exitcode for one in running] == [1, 1]
    finally:
        for one in running:
            one.kill()
    said = [line for rank in range(2) for line in (tmp_path / f"{rank}.txt").read_text().splitlines()]
    (line,) = [line for line in said if line.startswith("osp train: ")]
    host = socket.gethostname()
    assert re.search(rf"all 2 processes wait for rank 1 \(host {host}, process {running[1].pid}\) at step 3", line)
    assert re.search(r"nothing has moved for 5 s \(watchdog\).*in the forward pass; its stack is in", line)
    assert "time.sleep(1000)" in (tmp_path / "run" / "hung_rank_1.txt").read_text()
    assert line.removeprefix("osp train: ") in (tmp_path / "run" / "train.log").read_text()
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
    (began,) = json.loads((tmp_path / "run" / "run.json").read_text())["starts"]
    assert began["layout"] == {"data": 2, "sequence": 1, "tensor": 1}
    assert [process["process"] for process in began["processes"]] == [one.pid for one in running]
