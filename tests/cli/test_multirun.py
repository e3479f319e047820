"""Every job of a sweep writes into a folder of its own; `osp sample` and `osp train` have tests beside theirs."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from osp.cli import VERBS, config_folder

Osp = Callable[..., tuple[int, str, str]]
# One folder for all jobs: parts of a cache, one page or report, weights that name their files.
SHARED = {"cache", "doctor", "page", "import-weights", "inflate", "export", "export-weights"}


def test_shards_of_other_settings_are_not_mixed(osp: Osp, tmp_path: Path) -> None:
    drawn = [f"synthetic.{key}={value}" for key, value in {"clips": 2, "height": 16, "width": 16}.items()]
    code, out, err = osp("shards", "output=shards", "synthetic.frames=1,5", *drawn, "workers=0", "--multirun")
    assert code == 0, err
    results = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [result["output"] for result in results] == [str(tmp_path / "shards" / job) for job in "01"]
    shards = [file.read_bytes() for job in "01" for file in (tmp_path / "shards" / job).glob("*.tar")]
    assert len(shards) == len(set(shards)) == 2


def test_the_stages_of_two_chains_have_folders_of_their_own(osp: Osp) -> None:
    code, out, err = osp("chain", "chain=tiny", "output=runs", "shared=['seed=1'],['seed=2']", "dry_run=true", "-m")
    assert code == 0, err
    folders = re.findall(r"output=(\S+)", out)
    stages = [line.split("/")[-1] for line in folders[: len(folders) // 2]]
    assert len(stages) >= 2
    assert folders == [f"runs/{job}/{stage}" for job in "01" for stage in stages]
    started = re.findall(r"start_from=(\S+)", out)
    assert [path.split("/")[:2] for path in started] == [["runs", job] for job in "01" for _ in stages[1:]]


@pytest.mark.parametrize("verb", sorted(set(VERBS) - SHARED))
def test_a_sweep_has_a_folder_a_job(verb: str) -> None:
    cfg = OmegaConf.load(config_folder() / f"{verb}.yaml")
    sweep = OmegaConf.to_container(cfg.hydra.sweep, resolve=False)
    assert sweep == {"dir": "${output}", "subdir": "."}  # osp.cli.folders makes those of the jobs
