"""Before the processes of a run have met, one that is gone or fails ends the others."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed import DistNetworkError

from osp.errors import DataError, OspError
from osp.training import meeting
from osp.training.failures import failures_told
from osp.training.meeting import Meeting

HOST = socket.gethostname()

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> "SimpleQueue[str]":
    """The lines that would end this process, which nothing has started yet."""
    lines: SimpleQueue[str] = SimpleQueue()

    def end(folder: Path, line: str, end_others: Any, code: int) -> None:
        end_others()
        lines.put(f"{code} {line}")
        sys.exit()  # the thread

    monkeypatch.setattr(meeting, "end_process", end)
    monkeypatch.setattr(meeting, "_GRACE", 0.0)
    monkeypatch.setattr(meeting, "_PERIOD", 0.01)
    for name in ("OSP_FIRST_PROCESS", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "NODE_RANK"):
        monkeypatch.setenv(name, "")  # so that it is gone afterwards
        monkeypatch.delenv(name)
    return lines


@pytest.fixture
def other() -> Iterator["subprocess.Popen[bytes]"]:
    """Another process, which waits."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def is_rank(monkeypatch: pytest.MonkeyPatch, rank: int, **variables: str) -> None:
    """This process is one of two that a launcher has started."""
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": "5"}
    for name, value in (place | variables).items():
        monkeypatch.setenv(name, value)


def test_one_that_starts_others_ends_with_one_of_them(
    told: "SimpleQueue[str]", other: "subprocess.Popen[bytes]", tmp_path: Path
) -> None:
    killed: list[int] = []
    launcher = SimpleNamespace(procs=[], kill=killed.append)
    trainer: Any = SimpleNamespace(world_size=2, global_rank=0, strategy=SimpleNamespace(launcher=launcher))
    with Meeting(tmp_path) as meets:
        meets.begin(trainer)
        launcher.procs.append(other)
        assert told.empty()
        other.kill()
        line = told.get(timeout=60)
    assert line == (
        f"1 rank 0 of 2 on {HOST}: rank 1 (host {HOST}, process {other.pid}) is gone; it was last seen while it "
        "started; the same command goes on"
    )
    assert killed == [9]
    assert not [*tmp_path.iterdir()]


def test_one_that_was_started_ends_with_the_one_that_did(
    monkeypatch: pytest.MonkeyPatch, told: "SimpleQueue[str]", other: "subprocess.Popen[bytes]", tmp_path: Path
) -> None:
    is_rank(monkeypatch, 1, OSP_FIRST_PROCESS=str(other.pid))
    with Meeting(tmp_path):
        assert told.empty()
        other.kill()
        assert f"rank 1 of 2 on {HOST}: rank 0 (host {HOST}, process {other.pid}) is gone" in told.get(timeout=60)


def test_one_of_a_launcher_ends_with_one_that_fails(
    monkeypatch: pytest.MonkeyPatch, told: "SimpleQueue[str]", tmp_path: Path
) -> None:
    is_rank(monkeypatch, 0)
    first = Meeting(tmp_path)
    is_rank(monkeypatch, 1)

    def both_fail() -> None:
        with failures_told(tmp_path), first:
            with pytest.raises(DataError), Meeting(tmp_path):
                raise DataError("no clips")
            assert "rank 1 (host" in told.get(timeout=60)
            raise DistNetworkError("the connection was reset")

    with pytest.raises(OspError, match=r"rank 1 \(.*\) has failed: DataError: no clips; the same command goes on"):
        both_fail()
    with pytest.raises(OspError, match=r"have not met \(the connection was reset\)"), failures_told(tmp_path):
        raise DistNetworkError("the connection was reset")


def test_a_signal_ends_one_that_waits_for_others(
    monkeypatch: pytest.MonkeyPatch, told: "SimpleQueue[str]", tmp_path: Path
) -> None:
    is_rank(monkeypatch, 0)
    before = signal.signal(signal.SIGUSR1, lambda *arguments: None)  # which a process that waits does not come to
    try:
        with Meeting(tmp_path):
            os.kill(os.getpid(), signal.SIGUSR1)
            line = told.get(timeout=60)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert line == "138 ended by SIGUSR1 before all processes had met; the same command goes on"
    assert signal.set_wakeup_fd(-1) == -1


def test_it_is_over_when_all_have_met(
    monkeypatch: pytest.MonkeyPatch, told: "SimpleQueue[str]", tmp_path: Path
) -> None:
    is_rank(monkeypatch, 0)
    with Meeting(tmp_path) as meets:
        (file,) = tmp_path.glob(".ranks-*/0.json")
        assert file.exists()
        meets.on_fit_start(None, None)  # type: ignore[arg-type]
        assert not file.parent.exists()
        assert signal.set_wakeup_fd(-1) == -1
    monkeypatch.delenv("LOCAL_RANK")
    with Meeting(tmp_path):  # alone
        assert not [*tmp_path.iterdir()]
