"""The loaders under a real Trainer: what it trains on after a resume is what the uninterrupted run trains on."""

import osp  # isort: skip  # noqa: F401  (mends torchvision, which lightning imports)

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from osp.data.datamodule import ClipDataModule
from osp.data.loader import ResumableLoader
from osp.data.sources import ClipSource, SyntheticClips
from osp.errors import DataError, UsageError

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


class NumberClips(ClipSource):
    """Clip i is a 3x1x2x2 video of the value i."""

    def __init__(self, clips: int) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return self.clips

    def fingerprint(self) -> str:
        return f"numbers clips={self.clips}"

    def read(self, index: int, draw: int) -> dict[str, Any]:
        video = torch.full((3, 1, 2, 2), index, dtype=torch.uint8)
        return {"video": video, "caption": str(draw), "key": f"clip{index}", "fps": 8.0}


class Recorder(pl.LightningModule):
    """One weight, trained by hand as a GAN is; notes (global_step, epoch, keys) of what it trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, int, list[str]]] = []
        self.validated: list[list[str]] = []

    def batches_of(self, batch: Any) -> list[Any]:
        return [batch]

    def training_step(self, batch: Any, batch_index: int) -> None:
        batches = self.batches_of(batch)
        self.seen.append((self.global_step, self.current_epoch, [key for b in batches for key in b["key"]]))
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        optimizer.zero_grad()
        for each in batches:
            self.manual_backward(self.loss(each))
        optimizer.step()

    def loss(self, batch: Any) -> Tensor:
        loss: Tensor = ((self.weight - batch["video"].float() / 10) ** 2).mean()
        return loss

    def validation_step(self, batch: Any, batch_index: int) -> None:
        self.validated.append(batch["key"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Accumulating(Recorder):
    def setup(self, stage: str) -> None:
        self.trainer.datamodule.batches_per_step = self.batches_per_step

    def batches_per_step(self, step: int) -> int:
        return 1 if step < 4 else 3

    def batches_of(self, batch: Any) -> list[Any]:
        assert isinstance(batch, list)
        return batch


def trainer(folder: Path, callbacks: list[Callback] | None = None, **settings: Any) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
        callbacks=callbacks,
        use_distributed_sampler=False,
        **settings,
    )


def data(workers: int = 0, val: int | None = None, **settings: Any) -> ClipDataModule:
    return ClipDataModule(
        NumberClips(11), None if val is None else NumberClips(val), batch_size=2, workers=workers, **settings
    )


EPOCH = 5  # steps of 11 clips in batches of 2

SAVES = {
    "mid_epoch": {"every_n_train_steps": 3},
    "last_batch_of_an_epoch": {"every_n_train_steps": EPOCH},
    "train_epoch_end": {"every_n_epochs": 1, "save_on_train_epoch_end": True},
    "validation_end": {"every_n_epochs": 1, "save_on_train_epoch_end": False},
}
LIMITS = {
    "max_steps": {"max_steps": 17, "max_epochs": -1},
    "max_epochs": {"max_epochs": 4},
    "val_mid_epoch": {"max_steps": 17, "max_epochs": -1, "val_check_interval": 2},
    "short_epochs": {"max_steps": 17, "max_epochs": -1, "limit_train_batches": 4},
}


def fit(folder: Path, model: Recorder, datamodule: ClipDataModule, **settings: Any) -> pl.Trainer:
    ckpt_path = settings.pop("ckpt_path", None)
    run = trainer(folder, **settings)
    run.fit(model, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)
    return run


def keys(model: Recorder) -> list[list[str]]:
    return [keys for _, _, keys in model.seen]


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("save", SAVES)
def test_resume_equals_the_uninterrupted_run(tmp_path: Path, save: str, limit: str) -> None:
    whole = Recorder()
    keep = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, **SAVES[save])
    fit(tmp_path, whole, data(val=3), callbacks=[keep], **LIMITS[limit])
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) >= 3
    for number, checkpoint in enumerate(checkpoints):
        step = int(checkpoint.stem.removeprefix("step="))
        resumed = Recorder()
        fit(tmp_path, resumed, data(val=3, workers=number % 2), ckpt_path=checkpoint, **LIMITS[limit])
        assert [(s, k) for s, _, k in resumed.seen] == [(s, k) for s, _, k in whole.seen[step:]]
        assert torch.equal(resumed.weight, whole.weight)
    assert not multiprocessing.active_children()


def test_workers_read_ahead_without_moving_the_state(tmp_path: Path) -> None:
    whole = Recorder()
    fit(tmp_path, whole, data(workers=2), max_steps=13)
    stopped = Recorder()
    first = fit(tmp_path, stopped, data(workers=2), max_steps=7)
    first.save_checkpoint(tmp_path / "seven.ckpt")
    state = torch.load(tmp_path / "seven.ckpt", weights_only=True)
    assert state["ClipDataModule"]["batches"] == 7
    assert state["loops"]["fit_loop"]["state_dict"]["combined_loader"] == [state["ClipDataModule"]]
    resumed = Recorder()
    fit(tmp_path, resumed, data(workers=1), max_steps=13, ckpt_path=tmp_path / "seven.ckpt")
    assert keys(stopped) + keys(resumed) == keys(whole)
    assert not multiprocessing.active_children()


def test_a_loader_without_the_datamodule_resumes_in_mid_epoch(tmp_path: Path) -> None:
    def loader() -> ResumableLoader:
        return ResumableLoader(NumberClips(11), batch_size=2, seed=0)

    whole, resumed = Recorder(), Recorder()
    keep = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=4)
    trainer(tmp_path, [keep], max_epochs=3).fit(whole, loader())
    trainer(tmp_path, max_epochs=3).fit(resumed, loader(), ckpt_path=tmp_path / "step=8.ckpt", weights_only=True)
    assert keys(resumed) == keys(whole)[8:]


def test_a_module_that_asks_for_several_batches_a_step_gets_them(tmp_path: Path) -> None:
    plain = Recorder()
    fit(tmp_path, plain, data(), max_steps=4 + 4 * 3)
    samples = [key for keys_ in keys(plain) for key in keys_]
    whole = Accumulating()
    fit(tmp_path, whole, data(), max_steps=8)
    assert [len(step) for step in keys(whole)] == [2] * 4 + [6] * 4
    assert [key for step in keys(whole) for key in step] == samples
    for done in (3, 4, 6):
        stopped, resumed = Accumulating(), Accumulating()
        fit(tmp_path, stopped, data(), max_steps=done).save_checkpoint(tmp_path / "part.ckpt")
        fit(tmp_path, resumed, data(workers=1), max_steps=8, ckpt_path=tmp_path / "part.ckpt")
        assert keys(stopped) + keys(resumed) == keys(whole)
        assert torch.equal(resumed.weight, whole.weight)


SCRIPT = """
import osp, json, os, signal, sys
sys.path.insert(0, {folder!r})
from test_datamodule import NumberClips, Recorder, ModelCheckpoint, Path, trainer
from osp.data.datamodule import ClipDataModule

class Mortal(Recorder):
    def training_step(self, batch, batch_index):
        if self.global_step == 8:
            os.kill(os.getpid(), signal.SIGKILL)
        super().training_step(batch, batch_index)
        with open(f"rank{{self.global_rank}}.jsonl", "a") as file:
            print(json.dumps(batch["key"]), file=file)

folder = Path(".")
keep = ModelCheckpoint(folder, filename="{{step}}", save_top_k=-1, every_n_train_steps=3)
data = ClipDataModule(NumberClips(11), NumberClips(3), batch_size=2, workers=1)
run = trainer(folder, [keep], devices=2, strategy="ddp", max_steps=12, val_check_interval=2)
run.fit(Mortal(), datamodule=data)
"""


def test_two_ranks_killed_and_gone_on_with_one(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(SCRIPT.format(folder=os.path.dirname(__file__)))
    # An own session, so that whatever is left of the two ranks can be ended by its group.
    with (
        (tmp_path / "told.txt").open("w") as told,
        subprocess.Popen([sys.executable, "run.py"], cwd=tmp_path, start_new_session=True, stderr=told) as run,
    ):
        try:
            run.wait(timeout=200)
        finally:
            os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL, (tmp_path / "told.txt").read_text()
    ranks = [[json.loads(line) for line in (tmp_path / f"rank{r}.jsonl").open()] for r in range(2)]
    whole, resumed = Recorder(), Recorder()

    def one_rank() -> ClipDataModule:
        return ClipDataModule(NumberClips(11), NumberClips(3), batch_size=4)

    fit(tmp_path, whole, one_rank(), max_steps=12)
    assert [a + b for a, b in zip(*ranks, strict=True)] == keys(whole)[:8]
    fit(tmp_path, resumed, one_rank(), max_steps=12, ckpt_path=tmp_path / "step=6.ckpt")
    assert keys(resumed) == keys(whole)[6:]
    assert resumed.weight.item() == pytest.approx(whole.weight.item(), abs=1e-6)


def test_a_changed_seed_or_batch_size_ends_the_resume_with_one_line(tmp_path: Path) -> None:
    fit(tmp_path, Recorder(), data(), max_steps=3).save_checkpoint(tmp_path / "three.ckpt")
    with pytest.raises(UsageError, match="seed was 0, is 1"):
        fit(tmp_path, Recorder(), data(seed=1), max_steps=6, ckpt_path=tmp_path / "three.ckpt")
    other = ClipDataModule(NumberClips(11), None, batch_size=3)
    with pytest.raises(UsageError, match="was 2, is 3"):
        fit(tmp_path, Recorder(), other, max_steps=6, ckpt_path=tmp_path / "three.ckpt")


def test_reloading_the_loader_goes_on_and_a_second_fit_begins_anew(tmp_path: Path) -> None:
    whole = Recorder()
    fit(tmp_path, whole, data(), max_epochs=3)
    reloaded = Recorder()
    same = data()
    fit(tmp_path, reloaded, same, max_epochs=3, reload_dataloaders_every_n_epochs=1)
    assert keys(reloaded) == keys(whole)
    second = Recorder()
    fit(tmp_path, second, same, max_epochs=1)
    assert keys(second) == keys(whole)[:EPOCH]


def test_validation_reads_the_same_clips_in_order_each_time(tmp_path: Path) -> None:
    model = Recorder()
    settings = data(val=9, val_batch_size=3, val_clips=5, workers=1)
    fit(tmp_path, model, settings, max_epochs=2, num_sanity_val_steps=0)
    assert model.validated == [["clip0", "clip1", "clip2"], ["clip3", "clip4"]] * 2


def test_training_without_validation(tmp_path: Path) -> None:
    model = Recorder()
    fit(tmp_path, model, data(), max_epochs=1)
    assert len(model.seen) == EPOCH
    assert model.validated == []


def test_without_a_trainer_there_is_one_rank() -> None:
    module = data(val=3)
    assert len(module.train_dataloader()) == EPOCH
    assert [batch["key"] for batch in module.val_dataloader()] == [["clip0", "clip1"], ["clip2"]]


def test_synthetic_clips_train(tmp_path: Path) -> None:
    class Pixels(Recorder):
        def training_step(self, batch: Any, batch_index: int) -> None:
            assert batch["video"].shape == (2, 3, 5, 32, 48)
            assert batch["video"].dtype == torch.uint8
            super().training_step(batch, batch_index)

    train, val = (
        SyntheticClips(4, frames=5, height=32, width=48),
        SyntheticClips(2, frames=5, height=32, width=48, seed=1),
    )
    model = Pixels()
    fit(tmp_path, model, ClipDataModule(train, val, batch_size=2, workers=1), max_epochs=2)
    assert len(model.seen) == 4
    assert len(model.validated) == 3  # the sanity check, and once an epoch


@pytest.mark.parametrize(
    "settings",
    [{"batch_size": 0}, {"val_batch_size": 0}, {"workers": -2}, {"val_clips": 0}],
    ids=lambda s: next(iter(s)),
)
def test_senseless_settings_are_refused_at_once(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings)).removeprefix("val_")):
        ClipDataModule(NumberClips(4), NumberClips(4), **({"batch_size": 2} | settings))


def test_an_empty_validation_source_is_refused_at_once() -> None:
    with pytest.raises(DataError, match="clips=0"):
        ClipDataModule(NumberClips(4), NumberClips(0), batch_size=2)
