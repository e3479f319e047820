"""A training over a server that fails, killed and resumed, sees the samples of one without faults."""

import runpy
from pathlib import Path

import pytest

TOOL = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "stream_kills.py"))
STEPS = 10

pytestmark = [pytest.mark.filterwarnings("ignore:.*"), pytest.mark.timeout(280)]


def test_a_killed_training_over_a_failing_server_sees_the_same_samples(tmp_path: Path) -> None:
    whole, killed, served = (tmp_path / name for name in ("whole", "killed", "served"))
    for folder in (whole, killed):
        folder.mkdir()
    TOOL["write_clips"](served)
    with TOOL["FlakyServer"](served, 0) as sound:
        weight = TOOL["train"](sound.url, whole, STEPS)
    with TOOL["FlakyServer"](served, 3) as flaky:
        run = TOOL["start"](flaky.url, killed, STEPS, 1, 1)
        TOOL["kill_after"](run, killed, 6, 0.0, limit=200)
        assert run.returncode == -9, (killed / "told.txt").read_text()
        assert (killed / "last.ckpt").exists()
        gone_on = TOOL["train"](flaky.url, killed, STEPS, workers=2)
    assert TOOL["steps_seen"](killed) == TOOL["steps_seen"](whole)
    assert sorted(TOOL["steps_seen"](whole)) == list(range(STEPS))
    assert gone_on == weight
    assert flaky.failed
