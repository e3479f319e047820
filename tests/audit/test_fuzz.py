"""Damaged files, a few of each kind: readers refuse them in one line or read them; and the tool tells faults apart."""

import itertools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from osp.audit.fuzz import media
from osp.audit.fuzz.cases import FAULTS, KINDS, Originals, Outcome
from osp.audit.fuzz.changes import change_bytes, change_json, change_value, flip_bit
from osp.audit.fuzz.containers import change_checkpoint, change_tar, forged_pickle
from osp.audit.fuzz.flips import Flips
from osp.audit.fuzz.report import Tally
from osp.audit.fuzz.subject import Reading, Subject, digest
from osp.audit.fuzz.workers import Bounds, run_all
from osp.errors import DataError, OspError

SEED = "tests"
SLOW = ("vae-run", "denoiser-run")  # each case trains a step


def sized(path: Path) -> bytes:
    """A reader that is wrong about some files."""
    data = path.read_bytes()
    if not data.startswith(b"good"):
        raise DataError(f"{path}: is not good")
    return data[: 1000 // (data[-1] - ord("d"))] if len(data) == 4 else data


def originals(folder: Path, read: Callable[[Path], Any]) -> Originals:
    subject = Subject("x", lambda f: (f / "a.bin").write_bytes(b"good"), lambda f, reading: reading(read, f / "a.bin"))
    made = Originals(folder, [subject])
    with pytest.raises(ZeroDivisionError):
        made.make()
    made.read["x"] = ["as it was"]
    return made


def test_the_same_seed_gives_the_same_damage_and_another_seed_another() -> None:
    data = media.mp4()
    changes: list[Callable[[Random, bytes], bytes]] = [change_bytes, change_tar, change_checkpoint, flip_bit]
    for change in changes:
        assert change(Random("a"), data) == change(Random("a"), data)
        assert len({change(Random(str(seed)), data) for seed in range(8)}) > 4
    value = {"a": [1, 2.5, {"b": None}], "c": "text"}
    assert digest(change_value(Random(1), value)) == digest(change_value(Random(1), value))
    assert len({change_json(Random(seed), '{"a": [1, {"b": 2}], "c": "d"}') for seed in range(20)}) > 10
    assert value == {"a": [1, 2.5, {"b": None}], "c": "text"}
    flipped = flip_bit(Random(3), data)
    assert sum((a ^ b).bit_count() for a, b in zip(data, flipped, strict=True)) == 1
    assert forged_pickle(Random(1)).endswith(b".")


def test_an_error_to_tell_is_a_refusal_and_any_other_a_traceback(tmp_path: Path) -> None:
    made = originals(tmp_path, sized)
    subject, file = made.subjects[0], tmp_path / "a.bin"
    for content, state in ((b"bad", "refused"), (b"good", "traceback"), (b"goods", "different")):
        file.write_bytes(content)
        assert made.judged(subject, tmp_path, "a.bin").state == state
    made.read["x"] = [digest(b"goods")]
    assert made.judged(subject, tmp_path, "a.bin").state == "same"


def test_files_of_faults_are_kept_and_others_are_not(tmp_path: Path) -> None:
    made = originals(tmp_path / "files", sized)
    kept = {}
    for number in range(40):
        keep = tmp_path / f"keep{number}"
        kept[number] = made.run(f"{SEED}/{number}", keep).state == "traceback", keep.exists()
    assert {*kept.values()} <= {(True, True), (False, False)}


def test_a_crash_and_a_hang_cost_one_case_each(tmp_path: Path) -> None:
    def run(number: int) -> Outcome:
        if number == 1:
            os.kill(os.getpid(), signal.SIGSEGV)
        while number == 3:
            time.sleep(0)
        return Outcome("same", str(os.getpid()))

    outcomes = dict(run_all(run, iter(range(5)), Bounds(seconds=0.2), tmp_path / "log"))
    assert [outcomes[number].state for number in range(5)] == ["same", "crash", "same", "hang", "same"]
    tally = Tally("x")
    reasons = [tally.add(outcome) for outcome in outcomes.values()]
    assert [reason is not None for reason in reasons] == [False, True, False, True, False]
    assert "5 tried: 0 refused, 3 same, 0 different, 0 traceback, 1 crash, 1 hang" in str(tally)


def test_memory_beyond_the_limit_is_an_error_in_the_case_alone(tmp_path: Path) -> None:
    def run(number: int) -> Outcome:
        reading = Reading(lambda error: OspError("no memory") if isinstance(error, MemoryError) else None)
        reading(bytearray, 1 << 30 if number else 1)
        return Outcome("refused" if reading.refused else "same", "")

    outcomes = [outcome.state for _, outcome in run_all(run, iter(range(2)), Bounds(256), tmp_path / "log")]
    assert outcomes == ["same", "refused"]


def test_digests_tell_values_apart() -> None:
    values = [None, 0, 0.0, False, "", "0", b"0", [], (), {}, torch.zeros(2), torch.zeros(2, 1), torch.zeros(2).int()]
    values += [torch.tensor(1.0), torch.tensor(2.0), {"a": 1}, {"b": 1}, {"a": [1]}, Path("a")]
    assert len({digest(value) for value in values}) == len(values)
    for one, other in itertools.pairwise(values):
        assert digest([one, other]) != digest([other, one])


@pytest.mark.parametrize("kind", KINDS)
def test_no_damaged_file_ends_in_a_traceback(kind: str, tmp_path: Path) -> None:
    subjects = [subject for subject in KINDS[kind] if subject.name not in SLOW]
    made = Originals(tmp_path, subjects)
    made.make()
    outcomes = {number: made.run(f"{SEED}/{kind}/{number}") for number in range(60)}
    assert "refused" in {outcome.state for outcome in outcomes.values()}
    faults = {number: outcome for number, outcome in outcomes.items() if outcome.state in FAULTS}
    assert not faults, "\n".join(
        f"case {number} ({outcome.what}): {outcome.detail}" for number, outcome in faults.items()
    )


@pytest.mark.parametrize("target", ["shards", "listings", "features", "feature listings", "weights", "VAE checkpoint"])
def test_no_flipped_bit_is_silent(target: str, tmp_path: Path) -> None:
    flips = Flips(tmp_path, target)
    outcomes = [flips.run(0, number) for number in range(12)]
    assert {outcome.state for outcome in outcomes} <= {"refused", "same"}, outcomes
    assert any(outcome.state == "refused" for outcome in outcomes)
