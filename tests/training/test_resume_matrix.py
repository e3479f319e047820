"""Runs in several processes go on exactly, however they were ended: the short form of `tools/resume_matrix.py`."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))  # here and in the processes that are started

from resume_matrix import Matrix, Row


@pytest.mark.timeout(700)
def test_a_run_that_is_killed_and_asked_to_end_goes_on_in_other_layouts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    matrix = Matrix(tmp_path, Namespace(seed=0, steps=6, recipes=["denoiser"]))
    layouts, how = ["fsdp 2", "fsdp 2", "ddp 2", "one"], ["early kills", "signals", "kills"]
    matrix.disturb(Row("changing", "denoiser", layouts, how), 3)
    table = capsys.readouterr().out
    assert matrix.right, table
    assert "is gone; it was last seen while it started" in table
    assert "SIGUSR1: " in table
