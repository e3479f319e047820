"""What `make` would do: on machines of any size, and as its list says."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


def make(*arguments: str) -> str:
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60).stdout


@pytest.mark.parametrize(("cores", "processes"), [(1, 1), (2, 2), (3, 2), (4, 4), (6, 4), (64, 4)])
def test_the_demo_takes_the_cores_there_are_and_the_same_clips_a_step(cores: int, processes: int) -> None:
    said = make("--dry-run", "demo", f"CORES={cores}")
    (devices,) = re.findall(r"trainer\.devices=(\d+)", said)
    (batch_size,) = re.findall(r"data\.batch_size=(\d+)", said)
    assert re.findall(r" processes=(\d+)", said) == [devices] == [str(processes)]
    assert int(devices) * int(batch_size) == 16


def test_the_tests_run_in_a_process_for_each_core() -> None:
    assert "--numprocesses=3 " in make("--dry-run", "test", "CORES=3")


def test_the_list_names_every_target() -> None:
    (phony,) = re.findall(r"^\.PHONY: (.*)", MAKEFILE, re.MULTILINE)
    assert [line.split()[0] for line in make("help").splitlines()] == re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE)
    assert {*re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE)} == {*phony.split()}
