"""The tool that measures training steps on one device, at a size for the CPU."""

import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.mark.filterwarnings("ignore")
def test_sparse_and_dense_steps_are_measured_beside_the_plan(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    import card_step

    small = ["denoiser=cross_tiny", "denoiser.heads=2", "trainer=cpu"]
    monkeypatch.setattr(sys, "argv", ["card_step.py", "9x64x64:offload", "--steps", "1", "--set", *small])
    try:
        assert card_step.main() == 0
    finally:
        for name in ("card_step", "check_plan"):
            sys.modules.pop(name)
    _, _, *rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [(row[0], row[1], row[2]) for row in cells] == [
        ("9x64x64, offloaded", "48", "sparse"),
        ("9x64x64, offloaded", "48", "dense"),
    ]
    assert cells[1][4] == "1.00"  # dense to itself
    assert all(float(row[9]) >= 0.1 for row in cells)  # GiB: the process itself
