"""`osp eval target=reconstruction`: how much of videos survives a VAE."""

import logging
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import to_absolute_path
from omegaconf import DictConfig

from osp.cli.checks import CLIP, build_vae, check_numbers, check_vae_source
from osp.cli.data import build_source, check_data
from osp.cli.eval_input import model_name, read_clips
from osp.cli.plain import instantiate, plain
from osp.data.sources import ClipSource, OwnSizeClips, ShardClips
from osp.devices import choose_device, choose_precision
from osp.errors import UsageError
from osp.evaluation.frechet import video_features
from osp.evaluation.reconstruction import evaluate_reconstruction
from osp.training.runs import TrainingRun
from osp.vae import VideoVAE, fit_tiling
from osp.vae.lowest_band import LowestBand

log = logging.getLogger(__name__)


def reconstruction(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate as configured; gives the means and where the results lie.

    Raises UsageError before any compute for sizes that the VAE does not take.
    """
    least = {"max_clips": 1, "batch_size": 1, "contact_sheet_clips": 0, "save_videos": 0}
    check_numbers(cfg, CLIP | least, optional=["max_clips", "clip.frames", "clip.height", "clip.width"])
    check_data(cfg)
    check_vae_source(cfg)
    device = choose_device(cfg.device)
    precision = choose_precision(cfg.precision, device)
    output = Path(HydraConfig.get().runtime.output_dir)
    vae = build_vae(cfg.vae)
    source = _source(cfg, vae)
    source.summary().log()
    features = video_features("random3d" if cfg.features.path is None else "i3d", cfg.features.path)
    results = evaluate_reconstruction(
        vae,
        read_clips(source, len(source) if cfg.max_clips is None else min(cfg.max_clips, len(source))),
        output=output,
        model_name=model_name(cfg),
        device=device,
        precision=precision,
        batch_size=cfg.batch_size,
        perceptual=instantiate(cfg.perceptual),
        features=features,
        baselines={"lowest_haar_band": LowestBand(vae.time_stride)},
        contact_sheet_clips=cfg.contact_sheet_clips,
        save_videos=cfg.save_videos,
        settings=_settings(cfg),
    )
    keys = ("model", "counts", "mean", "frechet", "baselines", "psnr_gain")
    return {"output": str(output), **{key: results[key] for key in keys}}


def _source(cfg: DictConfig, vae: VideoVAE) -> ClipSource:
    """The clips, and tiles for their size where memory is limited."""
    height, width = cfg.clip.height, cfg.clip.width
    if cfg.max_memory is not None:
        if height is None or width is None:
            raise UsageError("max_memory needs one size of all clips; give clip.height and clip.width")
        vae.tiling = fit_tiling(vae, height, width, cfg.max_memory)
        log.info("max_memory=%s: %s", cfg.max_memory, vae.tiling or "whole frames fit")
    if cfg.get("data") is not None:
        return build_source(cfg)
    folder, limits = to_absolute_path(cfg.input), instantiate(cfg.limits)
    if None in (cfg.clip.frames, height, width):
        return OwnSizeClips(folder, vae.strides, **cfg.clip, limits=limits, where=cfg.where)
    vae.check_size(cfg.clip.frames, height, width)
    return ShardClips(folder, **cfg.clip, random_start=False, limits=limits, where=cfg.where)


def _settings(cfg: DictConfig) -> dict[str, Any]:
    settings = {"input": cfg.input, "checkpoint": cfg.checkpoint, "clip": dict(cfg.clip)}
    if cfg.get("data") is not None:
        settings |= {"data": plain(cfg.data[cfg.split]), "split": cfg.split}
    if cfg.checkpoint is not None and (curve := TrainingRun.of_checkpoint(cfg.checkpoint).curves().get("val/psnr")):
        settings["training_val_psnr"] = curve
    return settings
