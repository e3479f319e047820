"""`osp eval`: how much of a folder of videos survives a VAE."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate, to_absolute_path
from omegaconf import DictConfig, OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from osp.cli.checks import CLIP, build_vae, check_numbers
from osp.data.sources import ClipSource, ShardClips
from osp.data.video import ClipError
from osp.devices import choose_device
from osp.errors import UsageError
from osp.evaluation.frechet import video_features
from osp.evaluation.reconstruction import evaluate_reconstruction
from osp.vae import fit_tiling
from osp.vae.lowest_band import LowestBand

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate as configured; gives the means and where the results lie.

    Raises UsageError before any compute for sizes that the VAE does not take.
    """
    least = {"max_clips": 1, "batch_size": 1, "contact_sheet_clips": 0, "save_videos": 0}
    check_numbers(cfg, CLIP | least, optional=["max_clips"])
    if cfg.vae.get("path", "") is None:
        raise UsageError(
            "give checkpoint=FILE of `osp train`, vae=pretrained path=FOLDER of `osp import-weights`, "
            "or vae=published vae.kind=KIND vae.source=FILE"
        )
    device = choose_device(cfg.device)
    output = Path(HydraConfig.get().runtime.output_dir)
    vae = build_vae(cfg.vae)
    vae.check_size(cfg.clip.frames, cfg.clip.height, cfg.clip.width)
    if cfg.max_memory is not None:
        vae.tiling = fit_tiling(vae, cfg.clip.height, cfg.clip.width, cfg.max_memory)
        log.info("max_memory=%s: %s", cfg.max_memory, vae.tiling or "whole frames fit")
    source = ShardClips(to_absolute_path(cfg.input), **cfg.clip, random_start=False)
    features = video_features("random3d" if cfg.features.path is None else "i3d", cfg.features.path)
    results = evaluate_reconstruction(
        vae,
        _clips(source, len(source) if cfg.max_clips is None else min(cfg.max_clips, len(source))),
        output=output,
        model_name=_name(cfg),
        device=device,
        precision=cfg.precision,
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


def _clips(source: ClipSource, count: int) -> Iterator[Mapping[str, Any] | ClipError]:
    for index in range(count):
        try:
            yield source.read(index, 0)
        except ClipError as error:
            yield error


def _name(cfg: DictConfig) -> str:
    """What the results call the model: the run that trained it, or the file it came from."""
    if cfg.checkpoint is None:
        origin = cfg.vae.get("path") or cfg.vae.get("source") or ""
        return f"{cfg.vae.get('kind', 'VAE')} {Path(str(origin)).name}".strip()
    path = Path(cfg.checkpoint)
    settings = path.parent.parent / "config.yaml"
    return f"{OmegaConf.load(settings).name} {path.stem}" if settings.is_file() else path.stem


def _settings(cfg: DictConfig) -> dict[str, Any]:
    settings = {"input": cfg.input, "checkpoint": cfg.checkpoint, "clip": dict(cfg.clip)}
    if cfg.checkpoint is not None and (curve := _validation_curve(Path(cfg.checkpoint).parent.parent)):
        settings["training_val_psnr"] = curve
    return settings


def _validation_curve(run_folder: Path) -> list[tuple[int, float]]:
    """(step, PSNR) of each validation of the run that wrote the checkpoint, if its TensorBoard log is beside it."""
    folder = run_folder / "tensorboard"
    if not folder.is_dir():
        return []
    logging.getLogger("tensorboard").setLevel(logging.WARNING)  # it tells where it stops reading
    events = EventAccumulator(str(folder), size_guidance={"images": 1, "scalars": 0})
    events.Reload()
    if "val/psnr" not in events.Tags()["scalars"]:
        return []
    return [(event.step, round(event.value, 4)) for event in events.Scalars("val/psnr")]
