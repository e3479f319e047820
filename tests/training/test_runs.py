"""What a folder of `osp train` says of its run, and with which settings the run can go on."""

import json
import multiprocessing
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from osp.cli import config_folder
from osp.errors import DataError, UsageError
from osp.training.runs import TrainingRun


def composed(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return OmegaConf.to_container(compose("train", list(overrides)), resolve=True)  # type: ignore[return-value]


def saved(folder: Path, settings: dict[str, Any], *renamed: tuple[str, str]) -> TrainingRun:
    """A folder with these settings, written as by a version that had the second name of each pair for the first."""
    text = OmegaConf.to_yaml(OmegaConf.create(settings))
    for name, before in renamed:
        assert name in text
        text = text.replace(name, before)
    (folder / "config.yaml").write_text(text)
    return TrainingRun(folder)


def test_an_empty_folder_is_a_run_that_has_not_begun(tmp_path: Path) -> None:
    run = TrainingRun(tmp_path)
    assert (run.started, run.config(), run.name(), run.result(), run.curves()) == (False, None, None, None, {})
    assert not run.finished(1)
    assert run.other_setting({"seed": 1}) is None


def test_a_run_is_found_by_its_checkpoint(tmp_path: Path) -> None:
    run = TrainingRun.of_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert run.folder == tmp_path
    run.last.parent.mkdir()
    run.last.touch()
    assert run.started
    assert saved(tmp_path, {"name": "toy"}).name() == "toy"
    assert run.best == tmp_path / "checkpoints" / "best.ckpt"


def test_a_run_is_finished_at_the_steps_that_are_asked_for(tmp_path: Path) -> None:
    run = TrainingRun(tmp_path)
    run.result_file.write_text(json.dumps({"steps": 10, "val/loss": 0.5}))
    assert [run.finished(steps) for steps in (9, 10, 11)] == [True, True, False]
    for broken in ("{", "[]", "{}", '{"steps": "many"}'):
        run.result_file.write_text(broken)
        with pytest.raises(DataError, match=rf"{re.escape(str(run.result_file))}: .*; delete it"):
            run.result()


@pytest.mark.parametrize("broken", ["a: [", "just text"])
def test_settings_that_cannot_be_read_are_told_by_their_file(broken: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(broken)
    with pytest.raises(DataError, match=r"config\.yaml:.* (is no YAML|holds no settings)"):
        TrainingRun(tmp_path).config()


@pytest.mark.parametrize(
    ("change", "done", "goes_on"),
    [
        ("module.lr=0.1", "module.lr=0.002, not 0.1", None),
        ("module.decay_until=7", "module.decay_until=", None),
        ("module.accumulate=2", "module.accumulate=1, not 2", None),
        ("module.muon_lr=null", "module.muon_lr=0.005, not None", "module.muon_lr=0.005, not None"),
        ("module.muon_lr=0.1", "module.muon_lr=0.005, not 0.1", None),
        ("seed=3", "seed=0, not 3", "seed=0, not 3"),
        ("clip.frames=5", "clip.frames=9, not 5", "clip.frames=9, not 5"),
        ("denoiser=joint_tiny", "denoiser.", "denoiser."),
        ("data.workers=7", None, None),
        ("trainer.val_check_interval=7", None, None),
        ("checkpoint_every=7", None, None),
    ],
)
def test_a_run_goes_on_with_other_rates_and_a_key_that_was_given_is_named_where_it_cannot(
    change: str, done: str | None, goes_on: str | None, tmp_path: Path
) -> None:
    experiment = ["experiment=t2v_tiny", "denoiser=suv_tiny", "data.train.path=/data"]
    run = saved(tmp_path, composed(*experiment))
    now = composed(*experiment, change)
    for found, told in ((run.other_setting(now), done), (run.other_setting(now, done=False), goes_on)):
        assert (found or "").startswith(told or "")
        assert (found is None) == (told is None)
    if done != goes_on:
        assert run.changes(now)[0].startswith(change)


def test_a_longer_run_is_one_change_and_what_follows_from_it(tmp_path: Path) -> None:
    run = saved(tmp_path, composed("experiment=wfvae_tiny", "trainer.max_steps=30"))
    longer = composed("experiment=wfvae_tiny", "trainer.max_steps=40")
    assert run.other_setting(longer, done=False) is None
    assert run.changes(longer) == ["module.decay_until=40 (was 30)", "trainer.max_steps=40 (was 30)"]


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    run = TrainingRun(tmp_path / "run")
    with (
        run.locked(),
        pytest.raises(UsageError, match="run: another `osp train` is at work in this folder"),
        run.locked(),
    ):
        pass
    with run.locked():
        begun = multiprocessing.get_context("fork").Event()
        reader = multiprocessing.get_context("fork").Process(target=lambda: (begun.set(), time.sleep(60)))
        reader.start()  # as a loader does
        begun.wait()
    try:
        with run.locked():  # a process that outlives the run does not hold its lock
            pass
    finally:
        reader.kill()
        reader.join()


@pytest.mark.parametrize(
    ("overrides", "renamed"),
    [
        (
            ["experiment=t2v_tiny", "denoiser=suv_tiny", "data.train.path=/data"],
            [("modulation_width", "condition_channels"), ("data.sources.Feature", "data.features.Feature")],
        ),
        (
            ["experiment=i2v_tiny", "data=features", "data.train.path=/data"],
            [("frame_channels", "condition_channels"), ("data.sources.Feature", "data.features.Feature")],
        ),
        (["experiment=wfvae_tiny"], [("data.sources.Synthetic", "data.synthetic.Synthetic")]),
    ],
)
def test_a_run_begun_under_former_names_goes_on(
    overrides: list[str], renamed: list[tuple[str, str]], tmp_path: Path
) -> None:
    settings = composed(*overrides)
    run = saved(tmp_path, settings, *renamed)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) != settings
    assert run.other_setting(settings) is None
    changed = settings | {"clip": settings["clip"] | {"frames": 33}}
    assert run.other_setting(changed) == f"clip.frames={settings['clip']['frames']}, not 33"
