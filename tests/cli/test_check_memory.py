"""`osp train` refuses a run that the devices have no memory for, before its first step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from hydra import compose, initialize_config_dir

from osp.cli import config_folder
from osp.cli.plain import plain
from osp.cli.train import _planned_part
from osp.training.memory import check
from osp.training.memory.rehearsal import NotPlannedError, without_values

Osp = Callable[..., tuple[int, str, str]]
TINY = (
    "experiment=wfvae_tiny", "trainer.max_steps=1", "clip.frames=5", "clip.height=32", "clip.width=32",
    "data.workers=0", "data.batch_size=4", "data.val_clips=2", "logged_clips=0", "logger=[]",
)  # fmt: skip


def checked(**module: Any) -> str | None:
    """The check of a small run alone."""
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = plain(compose("train", list(TINY)))
    config["module"] |= module
    return check.check_fits(config, _planned_part, lightning.Trainer(accelerator="cpu", devices=1, logger=False))


def test_a_run_that_cannot_fit_is_refused(osp: Osp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "available_memory", lambda device: 20 << 20)
    code, _, said = osp("train", *TINY, f"output={tmp_path / 'run'}")
    assert code == 1
    assert "osp train: does not fit: each device needs 0.0" in said
    assert "data.batch_size=" in said
    assert said.endswith("; check_memory=false trains all the same")
    assert not (tmp_path / "run").exists()
    code, _, said = osp("train", *TINY, f"output={tmp_path / 'run'}", "check_memory=false")
    assert code == 0, said


def test_a_small_run_is_not_even_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "available_memory", lambda device: 8 << 30)
    monkeypatch.setattr(check, "plan_training", lambda asked: pytest.fail("it was planned"))
    assert checked() is None


def test_a_run_between_is_planned_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "available_memory", lambda device: 200 << 20)
    assert str(checked()).startswith("check_memory: 0.05 of 0.20 GiB")


def test_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "available_memory", lambda device: 200 << 20)
    assert check._room(torch.device("cpu"), 2) == 100 << 20
    monkeypatch.setattr(check, "total_memory", lambda device: 80 * 10**9)
    assert check._room(torch.device("cuda:1"), 2) == round(0.94 * 80 * 10**9)


@pytest.mark.parametrize(
    ("memory", "module", "reason"),
    [
        (None, {}, "this machine does not say how much memory it has"),
        (1, {"_target_": "mine.Module"}, "what mine.Module does in a step is not known"),
        (1, {"accumulate": 1, "loss": {"_target_": "osp.training.losses.VAELoss", "pixel": "l3"}}, "module.loss.pixel"),
    ],
)
def test_what_cannot_be_planned_goes_on_with_a_line(
    memory: int | None, module: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "available_memory", lambda device: memory)
    said = str(checked(**module))
    assert said.startswith("check_memory: not checked")
    assert reason in said


def test_a_model_that_needs_values_cannot_be_planned() -> None:
    with pytest.raises(NotPlannedError, match="does not run on tensors without values"), without_values():
        torch.empty(1, device="meta").item()
