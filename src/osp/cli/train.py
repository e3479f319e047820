"""`osp train`: seed, model, data, module, callbacks, logger, trainer, fit."""

import json
import logging
import os
import shutil
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
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from osp.errors import UsageError
from osp.training.callbacks import ClipLogger, ProgressLog
from osp.training.checkpoints import BEST, LAST, AtomicCheckpointIO, LastCheckpoint
from osp.weights.files import read_checkpoint

log = logging.getLogger(__name__)

# What a run cannot change half-way. The rest (steps, devices, intervals) may differ when it is continued.
_FIXED = ("vae", "module", "data", "clip", "seed")


def run(cfg: DictConfig) -> dict[str, Any] | None:
    """Train as configured, continuing the run in the output folder if there is one.

    Gives what is also written to `result.json` there (rank 0), or None (other ranks). Raises UsageError before any
    training for settings that do not fit together.
    """
    _quiet()
    output = Path(HydraConfig.get().runtime.output_dir)
    begun = time.monotonic()
    lightning.seed_everything(cfg.seed, verbose=False)

    vae = instantiate(cfg.vae)
    for part in ("train", "val"):
        clips = cfg.data[part]
        vae.check_size(clips.frames, clips.height, clips.width)
    checkpoint = _start(cfg, output)
    data = instantiate(cfg.data)
    module = instantiate(cfg.module, vae=vae)

    best = ModelCheckpoint(
        dirpath=output / "checkpoints",
        filename=BEST.removesuffix(".ckpt"),
        monitor="val/psnr",
        mode="max",
        enable_version_counter=False,
    )
    callbacks = [
        best,
        LastCheckpoint(output / "checkpoints", cfg.checkpoint_every),
        ClipLogger(cfg.logged_clips),
        ProgressLog(),
    ]
    trainer: lightning.Trainer = instantiate(
        cfg.trainer,
        callbacks=callbacks,
        logger=TensorBoardLogger(output, name="", version="tensorboard"),
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=sys.stderr.isatty(),
        default_root_dir=output,
    )
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    if not trainer.is_global_zero:
        return None
    result = {
        "name": cfg.name,
        "output": str(output),
        "steps": trainer.global_step,
        "parameters": sum(parameter.numel() for parameter in vae.parameters()),
        "best_val_psnr": float(best.best_model_score) if best.best_model_score is not None else None,
        **{key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")},
        "seconds": round(time.monotonic() - begun, 1),
        "overrides": list(HydraConfig.get().overrides.task),
    }
    _write(output / "result.json", json.dumps(result, indent=1))
    return result


def _quiet() -> None:
    """Keep Lightning's tips, and the second copy of every message, out of the log."""
    if not _is_first():
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
    # Few loader workers are enough where clips are made on the fly, and a value of the user's choice.
    warnings.filterwarnings("ignore", message=r"The '\w+' does not have many workers")


def _start(cfg: DictConfig, output: Path) -> Path | None:
    """The checkpoint to continue from, after checking that it is of a run with these settings."""
    settings = output / "config.yaml"
    last = output / "checkpoints" / LAST
    first = _is_first()  # the other processes of the run come here too, perhaps later
    if not cfg.resume and first:
        for part in ("checkpoints", "tensorboard"):
            shutil.rmtree(output / part, ignore_errors=True)
    going_on = cfg.resume and last.exists()
    if going_on:
        if settings.exists():
            _refuse_other_settings(OmegaConf.load(settings), cfg, output)
        step = read_checkpoint(last)["global_step"]
        log.info("continuing from step %d of %s", step, last)
        if step >= cfg.trainer.max_steps:
            log.info("nothing to do: trainer.max_steps=%d is reached", cfg.trainer.max_steps)
    if first:
        _write(settings, OmegaConf.to_yaml(cfg, resolve=True))
    return last if going_on else None


def _is_first() -> bool:
    """Whether this is the run's first process, as far as its launcher has said yet."""
    return getattr(rank_zero_only, "rank", 0) == 0


def _refuse_other_settings(before: Any, cfg: DictConfig, output: Path) -> None:
    for part in _FIXED:
        old, new = (_flat(_plain(config).get(part), part) for config in (before, cfg))
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                raise UsageError(
                    f"{output} holds a run with {key}={old.get(key)}, not {new.get(key)}; "
                    "choose another output=DIR, or resume=false to start over"
                )


def _plain(config: Any) -> dict[str, Any]:
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _flat(value: Any, key: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return {name: leaf for part, inner in value.items() for name, leaf in _flat(inner, f"{key}.{part}").items()}
    return {key: value}


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
