"""Runs of `osp train` one after another, each in a process of its own, beginning with the weights of the one before."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osp.errors import UsageError
from osp.files import folder_lock, write_whole
from osp.report.tables import as_texts, csv_text
from osp.training.own_process import RunError, run_train
from osp.training.runs import TrainingRun

log = logging.getLogger(__name__)

TABLE = "chain.csv"
COLUMNS = ("stage", "experiment", "best_val_loss", "val/loss", "steps", "parameters", "seconds", "checkpoint")


@dataclass(frozen=True)
class Stage:
    """One run of a chain.

    Args:
        overrides: of the command line of `osp train`, `output` and `start_from` among them.
        settings: what these make of the configuration of `osp train`, as plain values.
    """

    name: str
    experiment: str
    run: TrainingRun
    overrides: tuple[str, ...]
    settings: Mapping[str, Any]

    def finished(self) -> bool:
        """Whether its run has come to its last step. Raises DataError for a result that cannot be read."""
        return self.run.finished(self.settings["trainer"]["max_steps"])


def first_to_run(stages: Sequence[Stage]) -> int:
    """The number of the first stage that is not finished; that of all if they are.

    Raises UsageError for a folder with a run of other settings, and for one that began with weights which its
    predecessor would now train on.
    """
    for stage in stages:
        if stage.run.started and (other := stage.run.other_setting(stage.settings, done=stage.finished())):
            raise UsageError(
                f"stage {stage.name}: {stage.run.folder} holds a run with {other}; "
                "delete that folder, or choose another output=DIR"
            )
    first = next((number for number, stage in enumerate(stages) if not stage.finished()), len(stages))
    for stage in stages[first + 1 :]:
        if stage.run.started:
            raise UsageError(
                f"stage {stages[first].name} is not finished, but {stage.run.folder} holds a run that began after it; "
                "delete that one, or choose another output=DIR"
            )
    return first


def run_stages(stages: Sequence[Stage], first: int, output: Path) -> list[dict[str, Any]]:
    """Train the stages from number `first` on; gives a row of `COLUMNS` for each of all, which `chain.csv` holds too.

    Raises UsageError if another chain is at work in `output`, and RunError with the line and the exit code of a
    stage that fails.
    """
    with _locked(output) as lock:
        for number, stage in enumerate(stages[first:], start=first + 1):
            how = "continues" if stage.run.started else "begins"
            log.info("stage %s (%d of %d) %s, in %s", stage.name, number, len(stages), how, stage.run.folder)
            _train(stage, lock)
            if not stage.finished():
                raise RunError(f"stage {stage.name}: ended before its last step; the same command goes on", 1)
            write_whole(output / TABLE, csv_text(COLUMNS, as_texts(_rows(stages[:number]))))
    rows = _rows(stages)
    write_whole(output / TABLE, csv_text(COLUMNS, as_texts(rows)))
    return rows


@contextmanager
def _locked(output: Path) -> Iterator[int]:
    """Keeps another chain out of the folder, for as long as this process or a stage that it has started is there."""
    try:
        with folder_lock(output, wait=False) as lock:
            yield lock
    except BlockingIOError as error:
        raise UsageError(f"{output}: another `osp chain`, or a stage that it began, is still running") from error


def _train(stage: Stage, lock: int) -> None:
    """Run a stage in a process that holds the lock too. Raises RunError if it fails or is ended."""
    outcome = run_train(stage.overrides, keep=[lock])
    if outcome.signal is not None:
        raise RunError(f"stage {stage.name}: ended; the same command goes on", 128 + outcome.signal)
    if outcome.code:
        raise RunError(f"stage {stage.name}: {outcome.said}", outcome.code)


def _rows(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """A row for each of these stages, which are finished."""
    rows = []
    for stage in stages:
        about = {"stage": stage.name, "experiment": stage.experiment, "checkpoint": str(stage.run.last)}
        result = (stage.run.result() or {}) | about
        rows.append({column: result.get(column) for column in COLUMNS})
    return rows
