"""A run of `osp train` whose parts are built: where it goes on from, the fit itself, and what it leaves."""

import logging
import shutil
import signal
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.utilities.exceptions import SIGTERMException

from osp.data.datamodule import ClipDataModule
from osp.devices import accelerator_device, choose_precision
from osp.devices.mesh import Mesh
from osp.errors import DataError, UsageError
from osp.files import write_json, write_whole
from osp.training.module import TrainingModule
from osp.training.runs import CONFIG, TrainingRun, is_first_process
from osp.training.saving import BestCheckpoint
from osp.training.state import open_state

log = logging.getLogger(__name__)

_LEFT = ("checkpoints", "tensorboard", "csv")
"""What a run that starts over drops of the one before, beside its result."""

_EXPECTED_WARNINGS = (
    # The averaged twin of the model stays in eval mode on purpose.
    r"Found \d+ module\(s\) in eval mode",
    r".*LeafSpec.* is deprecated",
    # Steps are logged across epochs, however short these are.
    "The number of training batches .* is smaller than the logging interval",
    "Checkpoint directory .* exists and is not empty",
    # What is logged of a validation is summed over the processes before.
    r"It is recommended to use `self\.log\(.*sync_dist=True",
    # Few loader workers are enough where clips are made on the fly, and a value of the user's choice.
    r"The '\w+' does not have many workers",
)


@dataclass(frozen=True)
class Start:
    """Where a run begins: at the checkpoint, or at step 0 without one; `result` if it has been finished before."""

    checkpoint: Path | None = None
    result: dict[str, Any] | None = None


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


def begin(run: TrainingRun, settings: dict[str, Any], written: str, *, resume: bool) -> Start:
    """Make the folder ready, and say where the run with these settings (plain, and as they are written) begins.

    Nothing may fail between this and the fit: without `resume` the old checkpoints go here. Raises UsageError for a
    folder that holds a run with other settings.
    """
    first = is_first_process()  # the other processes of the run come here too, perhaps later
    if not resume and first:
        run.result_file.unlink(missing_ok=True)
        for part in _LEFT:
            shutil.rmtree(run.folder / part, ignore_errors=True)
    start = _continued(run, settings) if resume and run.started else Start()
    if first:
        run.folder.mkdir(parents=True, exist_ok=True)
        write_whole(run.folder / CONFIG, written)
    return start


def _continued(run: TrainingRun, settings: dict[str, Any]) -> Start:
    if other := run.other_setting(settings):
        raise UsageError(
            f"{run.folder} holds a run with {other}; choose another output=DIR, or resume=false to start over"
        )
    step, steps = open_state(run.last).step, settings["trainer"]["max_steps"]
    log.info("continuing from step %d of %s", step, run.last)
    if step < steps:
        return Start(run.last)
    log.info("nothing to do: trainer.max_steps=%d is reached", steps)
    return Start(run.last, run.result())


def fit(trainer: lightning.Trainer, module: TrainingModule, data: ClipDataModule, checkpoint: Path | None) -> None:
    """Train, from a checkpoint on if there is one. A process that is told to end exits with the code of its signal."""
    try:
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    except SIGTERMException:
        # Lightning would end with code 0, and what comes next would take half a run for a whole one.
        log.warning(
            "ended by SIGTERM at step %d of %d; the same command continues from the last checkpoint",
            trainer.global_step,
            trainer.max_steps,
        )
        sys.exit(128 + signal.SIGTERM)


def write_result(
    run: TrainingRun,
    trainer: lightning.Trainer,
    module: TrainingModule,
    *,
    name: str,
    seconds: float,
    overrides: Sequence[str],
) -> dict[str, Any]:
    """What a run has come to; also written to its folder."""
    score = next((one.score for one in trainer.checkpoint_callbacks if isinstance(one, BestCheckpoint)), None)
    result = {
        "name": name,
        "output": str(run.folder),
        "steps": trainer.global_step,
        "parameters": sum(parameter.numel() for parameter in module.learned.parameters()),
        "mode": module.mode,
        f"best_{module.monitor.replace('/', '_')}": score,
        **{key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")},
        "seconds": round(seconds, 1),
        "overrides": list(overrides),
    }
    write_json(run.result_file, result)
    return result
