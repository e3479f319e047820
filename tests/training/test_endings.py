"""A run that is asked to end writes a checkpoint first, and goes on from there as if nothing had been."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback

from osp.data.datamodule import ClipDataModule
from osp.data.sources import SyntheticClips
from osp.errors import DataError
from osp.training.checkpoint_io import AtomicCheckpointIO
from osp.training.endings import EndBySignal, Ended, Endings, leave
from osp.training.failures import failures_told
from osp.training.losses import VAELoss
from osp.training.records import Record, made_with
from osp.training.runs import TrainingRun
from osp.training.saving import BestCheckpoint, LastCheckpoint
from osp.training.vae_module import VAEModule
from osp.vae import WFVAE

TINY = {"latent_channels": 4, "base_channels": 4, "encoder_flow_channels": 4, "decoder_flow_channels": 4}


@pytest.fixture(autouse=True)
def _hangup_ends_a_process() -> Iterator[None]:
    """Let SIGHUP do what it does by default, also where the tests run under nohup, which ignores it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


class Signals(Callback):
    """Sends a signal to this process in a hook, after so many calls of it."""

    def __init__(self, hook: str, calls: int, number: int = signal.SIGTERM) -> None:
        self.left, self.number = calls, number
        setattr(self, hook, self._send)

    def _send(self, *args: Any, **kwargs: Any) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.number)


class Scores(Callback):
    """The outcome of each validation by its step."""

    def __init__(self) -> None:
        self.by_step: list[tuple[int, float]] = []

    def on_validation_end(self, trainer: lightning.Trainer, *args: Any) -> None:
        self.by_step.append((trainer.global_step, float(trainer.callback_metrics["val/psnr"])))


def train(folder: Path, *, goes_on: bool = False, signals: Callback | None = None) -> Scores:
    """Seven steps with a validation of two batches at every third."""
    torch.manual_seed(0)
    vae = WFVAE(**TINY, encoder_blocks=1, decoder_blocks=1, attention=False)
    clips = SyntheticClips(4, 5, 16, 16, seed=0)
    run, scores = TrainingRun(folder), Scores()
    endings = Endings(run)
    data = ClipDataModule(clips, clips, batch_size=2)
    data.waiting = endings.waiting
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    endings.install()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=7,
        max_epochs=-1,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[
            *([signals] if signals else []),
            EndBySignal(endings),
            scores,
            BestCheckpoint(run.last.parent),
            LastCheckpoint(run.last.parent, 100),
        ],
        plugins=[AtomicCheckpointIO()],
    )
    try:
        trainer.fit(VAEModule(vae, VAELoss(), lr=1e-3), data, ckpt_path=run.last if goes_on else None)
    finally:
        endings.restore()
        assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == before
    return scores


def equal(ours: Any, theirs: Any) -> bool:
    """Whether plain values with tensors in them are the same to the bit."""
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(equal(ours[key], theirs[key]) for key in ours)
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(equal, ours, theirs))
    return torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, float]]]:
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(folder).by_step


@pytest.mark.parametrize(
    ("hook", "calls", "number", "step", "due"),
    [
        ("on_train_batch_start", 2, signal.SIGTERM, 2, False),
        ("on_train_batch_end", 3, signal.SIGINT, 3, True),  # a validation comes next
        ("on_validation_batch_end", 1, signal.SIGINT, 3, True),
        ("on_validation_end", 1, signal.SIGTERM, 3, False),
        ("on_train_batch_end", 5, signal.SIGHUP, 5, False),
    ],
)
def test_a_run_that_was_ended_repeats_an_undisturbed_one(
    hook: str,
    calls: int,
    number: int,
    step: int,
    due: bool,
    whole: tuple[Path, list[tuple[int, float]]],
    tmp_path: Path,
) -> None:
    with pytest.raises(Ended) as ended:
        train(tmp_path, signals=Signals(hook, calls, number))
    assert ended.value.number == number
    last = TrainingRun(tmp_path).last
    content = torch.load(last, weights_only=True)
    assert (content["global_step"], content["callbacks"]["EndBySignal"]) == (step, {"validation_due": due})
    scores = train(tmp_path, goes_on=True).by_step
    assert scores == [score for score in whole[1] if score[0] >= step + (not due)]
    for name in ("last.ckpt", "best.ckpt"):
        ours, theirs = (torch.load(folder / "checkpoints" / name, weights_only=True) for folder in (tmp_path, whole[0]))
        for key in ("state_dict", "optimizer_states", "callbacks", "ClipDataModule"):
            assert equal(ours[key], theirs[key]), key


def test_before_the_first_step_a_signal_ends_at_once_and_there_is_no_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Ended) as ended:
        train(tmp_path, signals=Signals("setup", 1))
    run = TrainingRun(tmp_path)
    assert not run.started
    with pytest.raises(SystemExit) as stop:
        leave(run, ended.value)
    assert stop.value.code == 143
    assert "there is no checkpoint yet" in caplog.text
    run.last.parent.mkdir()
    run.last.touch()
    with pytest.raises(SystemExit) as stop:
        leave(run, Ended(signal.SIGINT), 3, 7)
    assert stop.value.code == 130
    assert f"ended by ^C at step 3 of 7: the same command goes on from {run.last}" in caplog.text


AT_ONCE = """
import os, signal, sys, time
from pathlib import Path
from osp.training.endings import Endings
from osp.training.runs import TrainingRun
endings = Endings(TrainingRun(Path(sys.argv[1])))
endings.install()
endings.may_leave = False
os.kill(os.getpid(), signal.SIGINT)
os.kill(os.getpid(), signal.SIGINT)  # the same one, as shells and launchers deliver it
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(0.6)
os.kill(os.getpid(), signal.SIGINT)
print("still there")
"""


def test_a_second_interrupt_ends_at_once(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".last.ckpt.part").touch()
    done = subprocess.run([sys.executable, "-c", AT_ONCE, str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.splitlines() == [
        "osp train: ending with a checkpoint when this step is over; ^C ends at once and without one",
        "osp train: ended at once",
    ]
    assert not [*(tmp_path / "checkpoints").iterdir()]


def test_the_record_is_written_when_the_training_begins_and_says_with_what(tmp_path: Path) -> None:
    run = TrainingRun(tmp_path)
    files = {".hydra/overrides.yaml": "[]\n"}
    (tmp_path / "history.jsonl").write_text('{"from_step": 0, "changed": []}\n')  # of an earlier version
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=9, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    for changed in ([], ["module.lr=2 (was 1)"]):
        record = Record(run, yaml.safe_dump({"name": "toy"}), files, ["seed=1"], changed)
        assert run.config() is None or not changed or run.name() == "toy"
        record.on_train_start(trainer, None)  # type: ignore[arg-type]
    config = run.config()
    assert config is not None
    assert config["made_with"] == made_with()
    assert config["made_with"]["torch"] == torch.__version__
    assert config["made_with"]["git"] is None or len(config["made_with"]["git"]["commit"]) == 40
    assert (tmp_path / ".hydra" / "overrides.yaml").read_text() == "[]\n"
    written = json.loads((tmp_path / "run.json").read_text())
    assert written["config"] == {"name": "toy"}
    assert [start["changed"] for start in written["starts"]] == [[], [], ["module.lr=2 (was 1)"]]
    last = written["starts"][-1]
    assert (last["from_step"], last["max_steps"], last["overrides"]) == (0, 9, ["seed=1"])
    assert last["layout"] == {"data": 1, "sequence": 1, "tensor": 1}
    (process,) = last["processes"]
    assert (process["process"], process["device"], process["host"]) == (os.getpid(), "cpu", socket.gethostname())
    assert process["memory_gib"] > 0
    assert last["command"] == sys.argv


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(28, "No space left on device"), r"run: cannot be written \(No space left on device\); make room"),
        (MemoryError(), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory .*fewer"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory .*data.batch_size"),
        (
            RuntimeError("DataLoader worker (pid 3) is killed by signal: 9. "),
            "process that reads clips has died",
        ),
        (RuntimeError("[gloo] Connection closed by peer"), "another process of the run has ended"),
    ],
)
def test_errors_of_the_machine_are_one_line(error: Exception, told: str) -> None:
    with pytest.raises(DataError, match=told) as raised, failures_told(Path("run")):
        raise error
    assert "\n" not in str(raised.value)


def test_an_error_that_hides_another_gives_way_to_it_and_a_bug_stays_one() -> None:
    hiding = OSError(28, "No space left on device")
    hiding.__context__ = DataError("first")
    with pytest.raises(DataError, match=r"^first$"), failures_told(Path("run")):
        raise hiding
    with pytest.raises(RuntimeError, match="shape"), failures_told(Path("run")):
        raise RuntimeError("shape mismatch")
