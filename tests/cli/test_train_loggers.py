"""`osp train` with other loggers and callbacks than those of every run."""

import csv
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from osp import __version__

Osp = Callable[..., tuple[int, str, str]]

SMALL = [
    *("experiment=wfvae_tiny", "debug=limit", "trainer.accelerator=cpu", "data.workers=0", "data.batch_size=2"),
    *("vae.base_channels=4", "vae.latent_channels=4", "vae.encoder_flow_channels=4", "vae.decoder_flow_channels=4"),
    *("clip.frames=5", "clip.height=16", "clip.width=16", "module.decay_until=null", "logged_clips=1"),
]


def steps_of(table: Path, name: str) -> list[int]:
    with open(table) as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row[name]]


def test_a_run_logs_to_several_and_going_on_keeps_what_is_there(tmp_path: Path, osp: Osp) -> None:
    run = ["train", *SMALL, "logger=[tensorboard,csv]", f"output={tmp_path / 'run'}"]
    assert osp(*run)[0] == 0
    assert osp(*run, "trainer.max_steps=6")[0] == 0
    tables = tmp_path / "run" / "csv"
    first, second = (tables / version / "metrics.csv" for version in ("version_0", "version_1"))
    assert [steps_of(table, "val/psnr") for table in (first, second)] == [[2, 4], [6]]
    for name in ("train/total", "train/lr"):  # the axis is that of the steps, also where the run went on
        assert [steps_of(table, name) for table in (first, second)] == [[0, 1, 2, 3], [4, 5]]
    assert steps_of(first, "train/clips_per_second")[0] == 1
    assert not [*tmp_path.rglob("hparams.yaml")]
    record = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    refused = osp(*run, "vae.decoder_blocks=2", "trainer.max_steps=8")
    assert refused[0] == 2
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()) == record
    assert "trainer.max_steps=6" in (tmp_path / "run" / ".hydra" / "overrides.yaml").read_text()
    assert record["made_with"]["osp"] == __version__
    clips = [path.relative_to(tables).as_posix() for path in tables.rglob("*.gif")]
    assert sorted(clips) == [
        *("version_0/val/clip_0_step_2.gif", "version_0/val/clip_0_step_4.gif", "version_1/val/clip_0_step_6.gif"),
    ]
    assert len([*(tmp_path / "run" / "tensorboard").glob("events.*")]) == 2
    assert osp(*run, "resume=false")[0] == 0
    assert [path.name for path in tables.iterdir()] == ["version_0"]


def test_a_job_of_a_sweep_without_loggers_keeps_its_checkpoints_apart(tmp_path: Path, osp: Osp) -> None:
    sweep = ["train", "--multirun", *SMALL, "logger=[]", "~callbacks.clips", "seed=3", f"output={tmp_path / 'sweep'}"]
    code, _, said = osp(*sweep)
    assert code == 0, said
    kept = {
        path.relative_to(tmp_path / "sweep" / "0").as_posix() for path in (tmp_path / "sweep" / "0").rglob("*.ckpt")
    }
    assert kept == {"checkpoints/best.ckpt", "checkpoints/last.ckpt"}
    assert not [*tmp_path.rglob("events.*")]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("logger=paper", "logger=paper: is not known; choose csv, tensorboard, wandb"),
        ("logger=null", "logger=null: several may be chosen of this group, and logger=\\[\\] chooses none"),
        ("~logger", "~logger: .*logger=\\[\\] chooses none"),
        ("+trainer.logger=true", "trainer.logger: choose loggers by their group, logger=NAME"),
        ("+trainer.callbacks=[]", r"trainer.callbacks: .* by \+callbacks\.NAME"),
        ("callbacks.last.every_n_steps=0", "checkpoint_every=0: must be a whole number of at least 1"),
        ("callbacks.clips.clips=-1", "logged_clips=-1: must be a whole number of at least 0"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(wrong: str, told: str, osp: Osp) -> None:
    code, _, said = osp("train", *SMALL, wrong)
    assert (code, said.count("\n")) == (2, 0)
    assert re.search(told, said), said
