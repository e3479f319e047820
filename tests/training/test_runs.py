"""What a folder of `osp train` says of its run, and with which settings the run can go on."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from osp.cli import config_folder
from osp.errors import DataError
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
        with pytest.raises(DataError, match=rf"{re.escape(str(run.result_file))}: is no .*; delete it"):
            run.result()


@pytest.mark.parametrize("broken", ["a: [", "just text"])
def test_settings_that_cannot_be_read_are_told_by_their_file(broken: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(broken)
    with pytest.raises(DataError, match=r"config\.yaml: (is no YAML|holds no settings)"):
        TrainingRun(tmp_path).config()


@pytest.mark.parametrize(
    ("change", "other"),
    [
        ("module.lr=0.1", "module.lr=0.002, not 0.1"),
        ("seed=3", "module.seed=0, not 3"),
        ("denoiser=joint_tiny", "module.denoiser.stages="),
        ("data.workers=7", None),
        ("trainer.val_check_interval=7", None),
        ("checkpoint_every=7", None),
    ],
)
def test_a_run_goes_on_with_other_steps_and_workers_only(change: str, other: str | None, tmp_path: Path) -> None:
    experiment = ["experiment=t2v_tiny", "denoiser=suv_tiny", "data.train.path=/data"]
    run = saved(tmp_path, composed(*experiment))
    found = run.other_setting(composed(*experiment, change))
    assert (found or "").startswith(other or "")
    assert (found is None) == (other is None)


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
