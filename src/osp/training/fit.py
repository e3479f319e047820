"""A run of `osp train` whose parts are built: where it goes on from, the fit itself, and what it leaves."""

import logging
import math
import shutil
import signal
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from osp.data.datamodule import ClipDataModule
from osp.devices import accelerator_device, choose_precision
from osp.devices.mesh import Mesh
from osp.errors import DataError, OspError, UsageError
from osp.files import write_json
from osp.training.endings import EndBySignal, Ended, Endings, leave
from osp.training.meeting import Meeting
from osp.training.module import TrainingModule
from osp.training.runs import TrainingRun, is_first_process
from osp.training.saving import BestCheckpoint, remove_parts
from osp.training.state import open_state

log = logging.getLogger(__name__)

_LEFT = ("checkpoints", "tensorboard", "csv")
"""The folders that a run which starts over deletes, beside the result of the run before."""

_EXPECTED_WARNINGS = (
    # The averaged twin of the model stays in eval mode on purpose.
    r"Found \d+ module\(s\) in eval mode",
    r".*LeafSpec.* is deprecated",
    # Steps are logged across epochs, however short these are.
    "The number of training batches .* is smaller than the logging interval",
    "Checkpoint directory .* exists and is not empty",
    # The logged values of a validation are summed over the processes before.
    r"It is recommended to use `self\.log\(.*sync_dist=True",
    # Nothing works in place on what a model gives.
    r"FSDP2-wrapped module \(.*\) returned a view tensor",
    # Few loader workers are enough if clips are made on the fly, and their number is the user's choice.
    r"The '\w+' does not have many workers",
)


@dataclass(frozen=True)
class Start:
    """Where a run begins: at the checkpoint, or at step 0 without one; `result` if it has been finished before.

    `changed` are the settings that are other than before (`TrainingRun.changes`).
    """

    checkpoint: Path | None = None
    result: dict[str, Any] | None = None
    changed: tuple[str, ...] = ()


def quiet_lightning() -> None:
    """Keep Lightning's tips, and the second copy of every message, out of the log."""
    if not is_first_process():
        logging.getLogger("osp").setLevel(logging.WARNING)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
        logging.getLogger(name).handlers.clear()
    for message in _EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def precision_on(precision: str, accelerator: str) -> str:
    """The precision that a Trainer is given; `auto` is what is fast on its device."""
    if precision != "auto":
        return precision
    return choose_precision("auto", accelerator_device(accelerator))


def batches_in_step(global_batch: int, batch_size: int | None, mesh: Mesh, accumulate: int = 1) -> int:
    """Batches of each device that make up the clips of a step on a mesh.

    Raises UsageError if the global batch cannot be split so, or if `accumulate` is set beside it.
    """
    if batch_size is None or accumulate != 1:
        raise UsageError("global_batch counts clips and sets module.accumulate; give only data.batch_size with it")
    at_once = batch_size * mesh.data
    if global_batch % at_once:
        nearest = max(1, round(global_batch / at_once)) * at_once
        raise UsageError(
            f"global_batch={global_batch} is no multiple of the {at_once} clips that data.batch_size="
            f"{batch_size} makes on all devices; choose another data.batch_size, or global_batch={nearest}"
        )
    return global_batch // at_once


def check_start(start_from: str | None, after: str | None, *, name: str, trains_denoiser: bool, goes_on: bool) -> None:
    """Refuse a new run without the weights that it is to begin with.

    Raises UsageError where they have to be given, and DataError where they are not there.
    """
    if goes_on:
        return
    if after is not None and start_from is None:
        raise UsageError(f"{name} begins with the weights of {after}: give start_from=CHECKPOINT of it, or after=null")
    if start_from is not None and trains_denoiser and not Path(start_from).exists():
        raise DataError(
            f"start_from={start_from}: no such file or folder; give a checkpoint of `osp train`, or a folder of "
            "`osp import-weights`"
        )


def check_kept(run: TrainingRun, module: TrainingModule, sources: Iterable[str | None]) -> None:
    """Before a folder is cleared for a new start: look at the weights that the run is to begin with, from `sources`.

    Raises UsageError for those that would go as well, and, if there is a run to lose, errors as their readers.
    """
    left = [(run.folder / part).resolve() for part in _LEFT]
    for source in sources:
        if source is not None and any(Path(source).resolve().is_relative_to(folder) for folder in left):
            raise UsageError(f"resume=false deletes {source}, which the run is to begin with; take another output=DIR")
    if run.started:
        module.check_weights()


def begin(run: TrainingRun, settings: dict[str, Any], *, resume: bool) -> Start:
    """Make the folder ready, and say where the run with these settings (plain values) begins.

    Nothing may fail between this and the fit: without `resume` the old checkpoints go here. Raises UsageError for a
    folder that holds a run with other settings.
    """
    first = is_first_process()  # the other processes of the run come here too, perhaps later
    if not resume and first:
        run.result_file.unlink(missing_ok=True)
        for part in _LEFT:
            shutil.rmtree(run.folder / part, ignore_errors=True)
    if first:
        remove_parts([run.folder, run.last.parent])
    return _continued(run, settings) if resume and run.started else Start()


def _continued(run: TrainingRun, settings: dict[str, Any]) -> Start:
    step, steps = _last_step(run), settings["trainer"]["max_steps"]
    done = step >= steps
    if other := run.other_setting(settings, done=done):
        weights = "start_from=" if settings.get("denoiser") is not None else "vae=trained checkpoint="
        goes_on = (
            "a larger trainer.max_steps goes on with that; " if not run.other_setting(settings, done=False) else ""
        )
        raise UsageError(
            f"{run.folder} holds a run with {other}; {goes_on}a new run with its weights: output=DIR "
            f"{weights}{run.last}, or resume=false to start over"
        )
    changed = tuple(run.changes(settings))
    log.info("continuing from step %d of %s%s", step, run.last, f" with {', '.join(changed)}" if changed else "")
    if not done:
        return Start(run.last, changed=changed)
    log.info("nothing to do: trainer.max_steps=%d is reached; a larger one goes on", steps)
    return Start(run.last, run.result())


def _last_step(run: TrainingRun) -> int:
    """The steps done. Raises DataError for a checkpoint that cannot be read, which says what else there is."""
    try:
        return open_state(run.last).step
    except OspError as error:
        others = [(step, one) for one in run.last.parent.glob("*.ckpt") if (step := _step_of(one)) is not None]
        mend = "resume=false starts over"
        if others:
            step, one = max(others)
            mend = f"delete {run.last.name} and give a copy of {one.name} its name to go on from step {step}, or {mend}"
        raise DataError(f"{error}; {mend}") from error


def _step_of(path: Path) -> int | None:
    try:
        return open_state(path).step
    except OspError:
        return None


def log_clips(data: ClipDataModule, *, captions: bool) -> None:
    """Log what the clips of training and validation are, what is left out of them, and whose captions are missing."""
    if not is_first_process():
        return
    for source in (data.train_source, data.val_source):
        if source is not None and source.path is not None:
            summary = source.summary()
            (summary if captions else replace(summary, captioned=None)).log()
        if data.val_source is not None and data.val_source.path == data.train_source.path:
            break


def fit(
    trainer: lightning.Trainer,
    module: TrainingModule,
    data: ClipDataModule,
    start: Start,
    endings: Endings,
    callbacks: Sequence[Callback] = (),
    meeting: Meeting | None = None,
) -> None:
    """Train from the start on, with these callbacks before the Trainer's.

    A process that is told to end writes a checkpoint, and exits with the code of its signal.
    """
    by_signal = EndBySignal(endings)
    trainer.callbacks[:0] = [*callbacks, *([meeting] if meeting else []), by_signal]  # type: ignore[attr-defined]
    if meeting is not None:
        meeting.begin(trainer)
    if trainer.world_size == 1:
        data.waiting = endings.waiting
    try:
        trainer.fit(module, data, ckpt_path=start.checkpoint, weights_only=True)
    except (Ended, SIGTERMException) as error:  # the latter before the first step, where Lightning has the signal
        _end_others(trainer, signal.SIGTERM)
        ended = error if isinstance(error, Ended) else Ended(signal.SIGTERM)
        leave(endings.run, ended, by_signal.saved, trainer.max_steps, endings.requeue)
    except BaseException:
        _end_others(trainer, signal.SIGKILL)  # they wait for this one
        raise


def _end_others(trainer: lightning.Trainer, number: signal.Signals) -> None:
    """Send a signal to the processes that this one has started."""
    if (launcher := trainer.strategy.launcher) is not None:
        launcher.kill(number)


def write_result(
    run: TrainingRun,
    trainer: lightning.Trainer,
    module: TrainingModule,
    *,
    name: str,
    seconds: float,
    overrides: Sequence[str],
) -> dict[str, Any]:
    """The result of a run, which is also written to its folder."""
    score = next((one.score for one in trainer.checkpoint_callbacks if isinstance(one, BestCheckpoint)), None)
    result = {
        "name": name,
        "output": str(run.folder),
        "steps": trainer.global_step,
        "parameters": sum(parameter.numel() for parameter in module.learned.parameters()),
        "mode": module.mode,
        f"best_{module.monitor.replace('/', '_')}": _finite(score),
        **{key: _finite(float(value)) for key, value in trainer.callback_metrics.items() if key.startswith("val/")},
        "seconds": round(seconds, 1),
        "overrides": list(overrides),
    }
    write_json(run.result_file, result)
    return result


def _finite(value: float | None) -> float | None:
    """The number, or None for what JSON cannot hold."""
    return value if value is not None and math.isfinite(value) else None
