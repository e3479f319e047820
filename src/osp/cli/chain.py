"""`osp chain`: the stages of a recipe one after another, each a run of `osp train` in a process of its own."""

import json
import logging
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from osp.cli import config_folder, user_error
from osp.cli.checks import check_numbers
from osp.cli.overrides import check_choices, quoted
from osp.cli.runs import RESULT, other_setting
from osp.errors import DataError, OspError, UsageError
from osp.files import folder_lock, write_whole
from osp.report.tables import as_texts, csv_text, print_table
from osp.training.checkpoints import LAST

log = logging.getLogger(__name__)

TABLE = "chain.csv"


class StageError(OspError):
    """A stage has failed; the chain ends as it did."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Stage:
    """One run of `osp train`.

    Args:
        overrides: of its command line, `output` and `start_from` among them.
        settings: what these make of the configuration of `osp train`.
    """

    name: str
    experiment: str
    output: Path
    overrides: tuple[str, ...]
    settings: DictConfig

    @property
    def checkpoint(self) -> Path:
        """Where its last state is."""
        return self.output / "checkpoints" / LAST

    @property
    def started(self) -> bool:
        """Whether it holds a run, finished or not."""
        return self.checkpoint.exists()

    def result(self) -> dict[str, Any] | None:
        """What it has left; None if it has not come to its last step."""
        path = self.output / RESULT
        if not path.exists():
            return None
        try:
            result: dict[str, Any] = json.loads(path.read_text())
            return result if result["steps"] >= self.settings.trainer.max_steps else None
        except (ValueError, LookupError, TypeError) as error:
            raise DataError(f"{path}: is not a result of `osp train`; delete it, and the stage goes on") from error


def run(cfg: DictConfig) -> dict[str, Any]:
    """Train all stages that are not finished, in order; gives what each has come to, which is also in `chain.csv`.

    Every stage begins with the averaged weights in the last checkpoint of the one before. All stages are composed, and
    compared with what is in their folders, before the first one runs.

    Raises UsageError before any work for stages that do not compose, or folders that hold other runs, and StageError
    with the line and the exit code of a stage that fails.
    """
    output = Path(HydraConfig.get().runtime.output_dir)
    stages = _stages(cfg)
    if cfg.dry_run:
        for stage in stages:
            print(shlex.join(["osp", "train", *stage.overrides]))
        return {"output": str(output), "stages": [stage.name for stage in stages]}
    first = _first_to_run(stages)
    results = [result for stage in stages[:first] if (result := stage.result()) is not None]
    for stage in stages[:first]:
        log.info("stage %s: finished, in %s", stage.name, stage.output)
    with _locked(output) as lock:
        for number, stage in enumerate(stages[first:], start=first + 1):
            how = "continues" if stage.started else "begins"
            log.info("stage %s (%d of %d) %s, in %s", stage.name, number, len(stages), how, stage.output)
            _train(stage, lock)
            if (result := stage.result()) is None:
                raise StageError(f"stage {stage.name}: ended before its last step; the same command goes on", 1)
            results.append(result)
            write_whole(output / TABLE, csv_text(*_table(stages, results)))
    columns, rows = _table(stages, results)
    write_whole(output / TABLE, csv_text(columns, rows))
    print_table(f"{len(stages)} stages in {output}", columns, rows)
    return {
        "output": str(output),
        "table": str(output / TABLE),
        "checkpoint": str(stages[-1].checkpoint),
        "finished_before": [stage.name for stage in stages[:first]],
        "stages": [dict(zip(columns, row, strict=True)) for row in _values(stages, results, columns)],
    }


def _stages(cfg: DictConfig) -> list[Stage]:
    """What the configuration says, with the commands that follow from it. Raises UsageError as `run`."""
    if not cfg.stages:
        choices = sorted(path.stem for path in (config_folder() / "chain").glob("*.yaml"))
        raise UsageError(f"choose chain=NAME: {', '.join(choices)}")
    output, before = Path(cfg.output), cfg.start_from
    stages: list[Stage] = []
    for name, said in cfg.stages.items():
        folder = output / name
        overrides = [f"experiment={said.experiment}", *cfg.shared, *said.overrides]
        overrides += [] if said.steps is None else [f"trainer.max_steps={said.steps}"]
        overrides += [] if said.data is None else [f"data.train.path={quoted(said.data)}"]
        overrides += [*cfg.overrides, f"output={quoted(folder)}"]
        overrides += [] if before is None else [f"start_from={quoted(before)}"]
        settings = _composed(name, overrides)
        missing = sorted(_missing(OmegaConf.to_container(settings), ""))
        if missing and not cfg.dry_run:
            listed = ",".join(f"'{key}=...'" for key in missing)
            raise UsageError(
                f"stage {name} needs {', '.join(missing)}: give overrides=[{listed}], "
                f"or stages.{name}.data=FOLDER for its clips"
            )
        stages.append(Stage(name, said.experiment, folder, tuple(overrides), settings))
        before = stages[-1].checkpoint
    return stages


def _composed(name: str, overrides: Sequence[str]) -> DictConfig:
    """The configuration of `osp train` with these overrides. Raises UsageError naming the stage."""
    loader = GlobalHydra.instance().config_loader()
    try:
        check_choices(overrides, config_folder())
        settings = loader.load_configuration("train", overrides=list(overrides), run_mode=RunMode.RUN)
        check_numbers(settings, {"trainer.max_steps": 1})
    except Exception as error:
        if (mended := user_error(error, "train")) is None:
            raise
        raise UsageError(f"stage {name}: {mended}") from error
    OmegaConf.set_struct(settings, False)
    settings.pop("hydra")
    return settings


def _missing(value: Any, key: str) -> Iterator[str]:
    """The keys of settings that have to be given; references to them are not followed, so each comes once."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _missing(inner, f"{key}.{name}" if key else name)
    elif value == "???":
        yield key


def _first_to_run(stages: Sequence[Stage]) -> int:
    """The number of the first stage that is not finished.

    Raises UsageError for a folder with a run of other settings, and for one that began with weights which its
    predecessor would now train on.
    """
    for stage in stages:
        if not stage.started or not (settings := stage.output / "config.yaml").exists():
            continue
        if other := other_setting(OmegaConf.load(settings), stage.settings):
            raise UsageError(
                f"stage {stage.name}: {stage.output} holds a run with {other}; "
                "delete that folder, or choose another output=DIR"
            )
    first = next((number for number, stage in enumerate(stages) if stage.result() is None), len(stages))
    for stage in stages[first + 1 :]:
        if stage.started:
            raise UsageError(
                f"stage {stages[first].name} is not finished, but {stage.output} holds a run that began after it; "
                "delete that one, or choose another output=DIR"
            )
    return first


@contextmanager
def _locked(output: Path) -> Iterator[int]:
    """Keeps another chain out of the folder, for as long as this process or a stage that it has started is there."""
    try:
        with folder_lock(output, wait=False) as lock:
            yield lock
    except BlockingIOError as error:
        raise UsageError(f"{output}: another `osp chain`, or a stage that it began, is still running") from error


def _train(stage: Stage, lock: int) -> None:
    """Run a stage, passing its messages on. Raises StageError if it fails."""
    command = [sys.executable, "-m", "osp.cli", "train", *stage.overrides]
    said = ""
    with (
        _ended_by_signals(),
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", pass_fds=[lock]
        ) as child,
    ):
        assert child.stdout is not None
        try:
            for line in child.stdout:
                if line.startswith("osp train: "):
                    said = said or line.removeprefix("osp train: ").strip()
                elif not line.startswith("{"):  # its result, which is read from its folder
                    sys.stderr.write(line)
        except BaseException:
            child.terminate()
            raise
    if child.returncode:
        code = child.returncode if child.returncode > 0 else 128 - child.returncode
        said = said or f"`osp train` ended with exit code {code}; its messages are above"
        raise StageError(f"stage {stage.name}: {said}", code)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM ends the block like an error, so that no stage is left behind."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _table(stages: Sequence[Stage], results: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows of the stages that are finished."""
    columns = ["stage", "experiment", "best_val_loss", "val/loss", "steps", "parameters", "seconds", "checkpoint"]
    return columns, as_texts(dict(zip(columns, row, strict=True)) for row in _values(stages, results, columns))


def _values(
    stages: Sequence[Stage], results: Sequence[Mapping[str, Any]], columns: Sequence[str]
) -> Iterator[list[Any]]:
    for stage, result in zip(stages, results, strict=False):
        about = {"stage": stage.name, "experiment": stage.experiment, "checkpoint": str(stage.checkpoint)}
        yield [(result | about).get(column) for column in columns]  # type: ignore[operator]
