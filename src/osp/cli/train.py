"""`osp train`: seed, model, data, module, callbacks, logger, trainer, fit."""

import json
import logging
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf

from osp.cli.checks import CLIP, check_numbers
from osp.cli.latents import codec_of
from osp.cli.runs import RESULT, is_first_process, other_setting
from osp.data.datamodule import ClipDataModule
from osp.devices import choose_device, choose_precision
from osp.errors import DataError, UsageError
from osp.files import write_whole
from osp.training.callbacks import ClipLogger, ProgressLog
from osp.training.checkpoints import BEST, LAST
from osp.training.module import TrainingModule
from osp.training.saving import AtomicCheckpointIO, LastCheckpoint
from osp.weights.files import read_checkpoint

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> dict[str, Any] | None:
    """Train as configured, continuing the run in the output folder if there is one.

    Gives what is also written to `result.json` there (rank 0), or None (other ranks). Raises UsageError before any
    training for settings that do not fit together.
    """
    _quiet()
    output = Path(HydraConfig.get().runtime.output_dir)
    begun = time.monotonic()
    steps = {"checkpoint_every": 1, "trainer.max_steps": 1, "trainer.val_check_interval": 1}
    check_numbers(cfg, CLIP | steps | {"seed": 0, "logged_clips": 0, "global_batch": 1}, optional=["global_batch"])
    lightning.seed_everything(cfg.seed, verbose=False)

    going_on = cfg.resume and (output / "checkpoints" / LAST).exists()
    if cfg.after is not None and cfg.start_from is None and not going_on:
        raise UsageError(
            f"{cfg.name} begins with the weights of {cfg.after}: give start_from=CHECKPOINT of it, or after=null"
        )
    starts = "denoiser" in cfg.module and cfg.start_from is not None and not going_on
    if starts and not Path(cfg.start_from).exists():
        raise DataError(
            f"start_from={cfg.start_from}: no such file or folder; give a checkpoint of `osp train`, or a folder of "
            "`osp import-weights`"
        )
    for part in ("train", "val"):
        clips = cfg.data[part]
        if clips is None:
            raise UsageError(f"data.{part}=null: training needs clips, and chooses the best checkpoint by validation")
        check_numbers(cfg, {f"data.{part}.{size}": 1 for size in ("frames", "height", "width") if size in clips})
        if "rule" in clips and clips.rule is None:
            raise UsageError("data=buckets needs a rule for the clips' shapes: choose buckets=tokens or buckets=shapes")
    data: ClipDataModule = instantiate(cfg.data)
    module: TrainingModule = instantiate(cfg.module, **codec_of(cfg, data))
    module.prepare(data)
    if cfg.start_from is not None and not going_on:
        module.start_from(cfg.start_from)

    best = ModelCheckpoint(
        dirpath=output / "checkpoints",
        filename=BEST.removesuffix(".ckpt"),
        monitor=module.monitor,
        mode=module.mode,
        enable_version_counter=False,
    )
    last = LastCheckpoint(output / "checkpoints", cfg.checkpoint_every)
    callbacks = [ClipLogger(cfg.logged_clips), ProgressLog(), best, last]
    trainer: lightning.Trainer = instantiate(
        cfg.trainer,
        # A run shorter than the interval is validated once, or it would have no best checkpoint.
        val_check_interval=min(cfg.trainer.val_check_interval, cfg.trainer.max_steps),
        precision=_precision(cfg),
        callbacks=callbacks,
        logger=TensorBoardLogger(output, name="", version="tensorboard"),
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=sys.stderr.isatty(),
        default_root_dir=output,
    )
    if cfg.global_batch is not None:
        module.accumulate = _accumulate(cfg, trainer.num_devices * trainer.num_nodes)
    checkpoint, done = _start(cfg, output)
    if done is not None:
        return done if trainer.is_global_zero else None
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
    if not trainer.is_global_zero:
        return None
    score = best.best_model_score
    result = {
        "name": cfg.name,
        "output": str(output),
        "steps": trainer.global_step,
        "parameters": sum(parameter.numel() for parameter in module.learned.parameters()),
        "mode": module.mode,
        f"best_{module.monitor.replace('/', '_')}": None if score is None else float(score),
        **{key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")},
        "seconds": round(time.monotonic() - begun, 1),
        "overrides": list(HydraConfig.get().overrides.task),
    }
    write_whole(output / RESULT, json.dumps(result, indent=1))
    return result


def _quiet() -> None:
    """Keep Lightning's tips, and the second copy of every message, out of the log."""
    if not is_first_process():
        logging.getLogger("osp").setLevel(logging.WARNING)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
        logging.getLogger(name).handlers.clear()
    # The averaged twin of the model stays in eval mode on purpose.
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
    warnings.filterwarnings("ignore", message=r".*LeafSpec.* is deprecated")
    # Steps are logged across epochs, however short these are.
    warnings.filterwarnings("ignore", message="The number of training batches .* is smaller than the logging interval")
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    # What is logged of a validation is summed over the processes before.
    warnings.filterwarnings("ignore", message=r"It is recommended to use `self\.log\(.*sync_dist=True")
    # Few loader workers are enough where clips are made on the fly, and a value of the user's choice.
    warnings.filterwarnings("ignore", message=r"The '\w+' does not have many workers")


def _precision(cfg: DictConfig) -> str:
    """That of the trainer; `auto` is what is fast on its device."""
    if cfg.trainer.precision != "auto":
        return cfg.trainer.precision
    device = {"gpu": "cuda"}.get(cfg.trainer.accelerator, cfg.trainer.accelerator)
    return choose_precision("auto", choose_device(device))


def _accumulate(cfg: DictConfig, devices: int) -> int:
    """Batches of each device in a step that make up the global batch.

    Raises UsageError if it cannot be split so, or accumulation is set as well.
    """
    if cfg.module.accumulate != 1 or cfg.data.batch_size is None:
        raise UsageError("global_batch counts clips and sets module.accumulate; give only data.batch_size with it")
    at_once = cfg.data.batch_size * (cfg.data.get("devices") or devices)
    if cfg.global_batch % at_once:
        nearest = max(1, round(cfg.global_batch / at_once)) * at_once
        raise UsageError(
            f"global_batch={cfg.global_batch} is no multiple of the {at_once} clips that data.batch_size="
            f"{cfg.data.batch_size} makes on all devices; choose another data.batch_size, or global_batch={nearest}"
        )
    return cfg.global_batch // at_once


def _start(cfg: DictConfig, output: Path) -> tuple[Path | None, dict[str, Any] | None]:
    """The checkpoint to continue from, if it is of a run with these settings, and the result if there is one already.

    Nothing may fail between this and the fit: with resume=false the old checkpoints go here.
    """
    settings, last, result = output / "config.yaml", output / "checkpoints" / LAST, output / RESULT
    first = is_first_process()  # the other processes of the run come here too, perhaps later
    if not cfg.resume and first:
        result.unlink(missing_ok=True)
        for part in ("checkpoints", "tensorboard"):
            shutil.rmtree(output / part, ignore_errors=True)
    going_on = cfg.resume and last.exists()
    done = None
    if going_on:
        if settings.exists() and (other := other_setting(OmegaConf.load(settings), cfg)):
            raise UsageError(
                f"{output} holds a run with {other}; choose another output=DIR, or resume=false to start over"
            )
        step = read_checkpoint(last)["global_step"]
        log.info("continuing from step %d of %s", step, last)
        if step >= cfg.trainer.max_steps:
            log.info("nothing to do: trainer.max_steps=%d is reached", cfg.trainer.max_steps)
            done = json.loads(result.read_text()) if result.exists() else None
    if first:
        output.mkdir(parents=True, exist_ok=True)
        write_whole(settings, OmegaConf.to_yaml(cfg, resolve=True))
    return last if going_on else None, done
