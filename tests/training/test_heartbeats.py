"""Which process of a run is missing or behind, by the files that all write."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from osp.errors import UsageError
from osp.training.heartbeats import Beat, Heartbeats, behind, is_gone, missing
from osp.training.watchdog import Watchdog

MINE = Beat.here("start", 0)


def test_those_that_are_least_far_and_do_not_wait_themselves_are_behind() -> None:
    waiting, working = replace(MINE, moves=7, waits=True), replace(MINE, rank=1, moves=7)
    ahead = replace(MINE, rank=2, moves=8)
    assert behind([waiting, working, ahead]) == [working]
    assert behind([waiting, ahead]) == [waiting]
    assert behind([working, replace(ahead, moves=6, waits=True)])[0].rank == 2


def test_a_process_is_gone_also_while_nobody_has_waited_for_it() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        beat = replace(MINE, rank=3, process=other.pid)
        assert not is_gone(beat)
        assert missing([MINE, beat]) is None
        other.kill()
        limit = time.monotonic() + 10
        while not is_gone(beat) and time.monotonic() < limit:
            time.sleep(0.01)
        failed = replace(MINE, rank=1, failed="ValueError: no")
        assert missing([failed, beat]) == beat  # the others may have failed because of it
        assert missing([failed]) == failed
        assert not is_gone(replace(beat, host="elsewhere"))


def test_a_file_that_does_not_change_any_more_counts_as_idle_and_other_starts_do_not_count(tmp_path: Path) -> None:
    beats, theirs = Heartbeats(tmp_path), Heartbeats(tmp_path)
    theirs.write(replace(MINE, rank=1, idle=2.0))
    theirs.write(replace(MINE, rank=2, start="before"))
    (tmp_path / ".ranks" / "3.json").write_text("{")
    assert [beat.idle for beat in beats.others(MINE, 100.0)] == [2.0]
    assert [beat.idle for beat in beats.others(MINE, 107.0)] == [9.0]
    assert beats.silence(1, 107.0) == 7.0
    theirs.write(replace(MINE, rank=1, idle=3.0))
    assert [beat.idle for beat in beats.others(MINE, 108.0)] == [3.0]
    beats.clear("start")
    assert os.listdir(tmp_path / ".ranks") == ["1.json"]
    theirs.drop(1)
    assert not (tmp_path / ".ranks").exists()


def test_a_limit_must_be_above_0(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="watchdog=0: must be a number above 0"):
        Watchdog(tmp_path, 0)
