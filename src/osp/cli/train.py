"""`osp train`: seed, model, data, module, callbacks, logger, trainer, fit."""

import logging
import time
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from osp.checks import check_choice
from osp.cli.checks import CLIP, build_vae, check_checkpoint, check_numbers
from osp.cli.plain import instantiate, plain
from osp.cli.sweep import is_own_process_needed, run_job
from osp.configs.texts import escaped
from osp.data.datamodule import ClipDataModule
from osp.devices.device import placed_trainer
from osp.devices.mesh import Mesh
from osp.errors import UsageError
from osp.training.build import is_built_later
from osp.training.checkpoint_io import AtomicCheckpointIO
from osp.training.cluster import cluster_plugins, tell_rank_of_node
from osp.training.codec import codec_of
from osp.training.endings import Ended, Endings, leave
from osp.training.failures import failures_told
from osp.training.fit import (
    batches_in_step,
    begin,
    check_kept,
    check_start,
    fit,
    log_clips,
    precision_on,
    quiet_lightning,
    write_result,
)
from osp.training.meeting import Meeting
from osp.training.memory.check import check_fits
from osp.training.memory.rehearsal import NotPlannedError
from osp.training.module import TrainingModule
from osp.training.records import Record
from osp.training.runs import TrainingRun

log = logging.getLogger(__name__)

# Keys of `trainer` whose values other settings decide, and what to do instead.
_TRAINER_KEYS = {
    "logger": "choose loggers by their group, logger=NAME or logger=[NAME,NAME]; one of your own is added to ours by "
    "+logger.NAME._target_=CLASS",
    "callbacks": "callbacks of your own are added to ours by +callbacks.NAME._target_=CLASS",
    "default_root_dir": "the folder of the run is output=DIR",
    "plugins": "checkpoints are written by a plugin of ours, and others cannot be given",
    "enable_progress_bar": "a terminal has a progress bar and a log has lines",
}


def run(cfg: DictConfig) -> dict[str, Any] | None:
    """Train as configured, continuing the run in the output folder if there is one.

    Gives what is also written to `result.json` there (rank 0), or None (other ranks). Raises UsageError before any
    training for settings that do not fit together.
    """
    tell_rank_of_node(cfg.trainer.get("num_nodes", 1))
    quiet_lightning()
    training = TrainingRun(Path(HydraConfig.get().runtime.output_dir))
    if is_own_process_needed(cfg):
        return run_job(training)
    files = _hydra_files(cfg)
    cfg.output = escaped(str(training.folder))  # that of this job in a sweep
    endings = Endings(training, requeue=cfg.requeue)
    endings.install()
    try:
        meeting = Meeting(training.folder, cfg.trainer.get("num_nodes", 1))
        with failures_told(training.folder), meeting, training.locked():
            result = _run(cfg, training, endings, files, meeting)
        endings.leave_if_asked()
        return result
    except Ended as ended:
        leave(training, ended, requeue=endings.requeue)
    finally:
        endings.restore()


def _run(
    cfg: DictConfig, training: TrainingRun, endings: Endings, files: dict[str, str], meeting: Meeting
) -> dict[str, Any] | None:
    begun = time.monotonic()
    _check(cfg)
    lightning.seed_everything(cfg.seed, verbose=False)
    goes_on = cfg.resume and training.started
    denoises = "denoiser" in cfg.module
    check_start(cfg.start_from, cfg.after, name=cfg.name, trains_denoiser=denoises, goes_on=goes_on)
    data: ClipDataModule = instantiate(cfg.data)
    trainer = _trainer(cfg, training.folder)
    planned = check_fits(plain(cfg), _planned_part, trainer) if cfg.check_memory else None
    module = _module(cfg, data)
    module.prepare(data)
    if cfg.start_from is not None and not goes_on:
        module.start_from(cfg.start_from)
    mesh = Mesh.of(trainer)
    if cfg.global_batch is not None:
        mesh = Mesh(cfg.data.get("devices") or mesh.data)
        module.accumulate = batches_in_step(cfg.global_batch, cfg.data.batch_size, mesh, cfg.module.accumulate)
    if not cfg.resume:
        keys = [f"module.{part}.{key}" for part in ("denoiser", "vae") for key in ("path", "source")]
        check_kept(training, module, [cfg.start_from, *(OmegaConf.select(cfg, key) for key in keys)])
    start = begin(training, plain(cfg), resume=cfg.resume)
    if planned is not None:  # said now: settings that fit nothing have ended the run by now
        log.info(planned)
    overrides = HydraConfig.get().overrides.task
    if start.result is None:
        record = Record(training, OmegaConf.to_yaml(cfg, resolve=True), files, overrides, start.changed)
        log_clips(data, captions=denoises)
        fit(trainer, module, data, start, endings, [record], meeting)
    if not trainer.is_global_zero:
        return None
    about = {"name": cfg.name, "seconds": time.monotonic() - begun, "overrides": overrides}
    return start.result or write_result(training, trainer, module, **about)


def _hydra_files(cfg: DictConfig) -> dict[str, str]:
    """The texts, by path, of files that Hydra would write too early: the configuration, Hydra's own, the overrides."""
    hydra: Any = HydraConfig.get()
    return {
        ".hydra/config.yaml": OmegaConf.to_yaml(cfg),
        ".hydra/hydra.yaml": OmegaConf.to_yaml(OmegaConf.create({"hydra": OmegaConf.masked_copy(hydra, [*hydra])})),
        ".hydra/overrides.yaml": OmegaConf.to_yaml(hydra.overrides.task),
    }


def _check(cfg: DictConfig) -> None:
    for key in ("requeue", "check_memory"):
        check_choice(key, cfg[key], (True, False))
    steps = {"checkpoint_every": 1, "trainer.max_steps": 1, "trainer.val_check_interval": 1}
    for key, instead in _TRAINER_KEYS.items():
        if key in cfg.trainer:
            raise UsageError(f"trainer.{key}: {instead}")
    check_numbers(cfg, CLIP | steps | {"seed": 0, "logged_clips": 0, "global_batch": 1}, optional=["global_batch"])
    for part in ("train", "val"):
        clips = cfg.data[part]
        if clips is None:
            raise UsageError(f"data.{part}=null: training needs clips, and chooses the best checkpoint by validation")
        check_numbers(cfg, {f"data.{part}.{size}": 1 for size in ("frames", "height", "width") if size in clips})
        if "rule" in clips and clips.rule is None:
            raise UsageError("data=buckets needs a rule for the clips' shapes: choose buckets=tokens or buckets=shapes")


def _planned_part(config: Any) -> Any:
    """The object of a part of a configuration; one that cannot be built ends the run later, where it is needed."""
    try:
        return instantiate(config)
    except InstantiationException as error:
        raise NotPlannedError(" ".join(str(error).split())) from error


def _module(cfg: DictConfig, data: ClipDataModule) -> TrainingModule:
    """The module to train, with its clips' codec if it works on latents; models get weights when training begins."""
    if "denoiser" not in cfg.module:
        return instantiate(cfg.module, **_without_memory(cfg.module, "vae", "discriminator"))
    vae = None
    if cfg.vae.get("path", cfg.vae.get("source")) is not None:
        check_checkpoint(cfg, cfg.vae)
        vae = build_vae(cfg.vae)
    codec, scaling_clips = codec_of(
        data.train_source,
        vae,
        lambda vae: instantiate(cfg.latent, vae=vae),
        is_scaling_given=(cfg.latent.shift, cfg.latent.scale) != (None, None),
        shows_clips=bool(cfg.logged_clips),
    )
    models = _without_memory(cfg.module, "denoiser", "text")
    return instantiate(cfg.module, codec=codec, scaling_clips=scaling_clips, **models)


def _without_memory(cfg: DictConfig, *parts: str) -> dict[str, Any]:
    """The parts of a module that get weights later, built without any; parts of other classes are left out."""
    later = [part for part in parts if cfg[part] is not None and is_built_later(get_object(cfg[part]._target_))]
    with torch.device("meta"):
        return {part: instantiate(cfg[part]) for part in later}


def _trainer(cfg: DictConfig, folder: Path) -> lightning.Trainer:
    return instantiate(
        cfg.trainer,
        # A run shorter than the interval is validated once, or it would have no best checkpoint.
        val_check_interval=min(cfg.trainer.val_check_interval, cfg.trainer.max_steps),
        precision=precision_on(cfg.trainer.precision, cfg.trainer.accelerator),
        **placed_trainer(cfg.trainer.accelerator, cfg.trainer.strategy, plain(cfg.trainer).get("devices")),
        callbacks=[instantiate(callback) for callback in (cfg.get("callbacks") or {}).values()],
        logger=[instantiate(logger) for logger in (cfg.logger or {}).values()],
        plugins=[
            AtomicCheckpointIO(cfg.checkpoint_form, cfg.checkpoint_keep, cfg.checkpoint_background),
            *cluster_plugins(),
        ],
        enable_progress_bar=False,  # a callback shows the steps
        default_root_dir=folder,
    )
