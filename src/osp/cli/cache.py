"""`osp cache`: clips -> a folder of features, that a denoiser trains on without its VAE and text encoder."""

import logging
import time
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log
from hydra.utils import instantiate, to_absolute_path
from omegaconf import DictConfig, OmegaConf
from torch import multiprocessing

from osp.checks import check_choice
from osp.cli import user_error
from osp.cli.checks import CLIP, build_vae, check_numbers, check_vae_source
from osp.data.features.format import DTYPES, POSTERIORS, load_feature_index, require_feature_index
from osp.data.features.writer import FeatureWriter, feature_report
from osp.data.sources import BucketClips, ClipSource, ShardClips
from osp.devices import choose_device, choose_precision
from osp.devices.device import backend
from osp.errors import DataError, OspError, UsageError
from osp.files import folder_lock
from osp.training.encode_features import (
    FeatureEncoder,
    encode_features,
    measure_source_scaling,
    read_scaling,
)
from osp.vae import LatentCodec, VideoVAE

log = logging.getLogger(__name__)

# Held while the scale is measured: whoever comes first does it, and the others read it in the index.
_SCALING_LOCK = ".scaling.lock"


def run(cfg: DictConfig) -> dict[str, Any]:
    """Encode what is not encoded yet; gives what the folder holds now.

    Raises UsageError before any work for settings that do not fit together or to the folder, and DataError if no clip
    can be used.
    """
    least = {"min_clips": 1, "latent.scaling_clips": 1, "batch_size": 1, "workers": 1, "shard_clips": 1}
    check_numbers(cfg, CLIP | least | {"processes": 1, "part": 0, "parts": 1})
    if cfg.part >= cfg.parts:
        raise UsageError(f"part={cfg.part}, parts={cfg.parts}: the parts are 0 to {cfg.parts - 1}")
    check_choice("posterior", cfg.posterior, POSTERIORS)
    check_choice("dtype", cfg.dtype, DTYPES)
    check_vae_source(cfg)
    cfg.precision = choose_precision(cfg.precision, choose_device(cfg.device))  # which goes into the folder
    output = Path(to_absolute_path(cfg.output))
    load_feature_index(output)  # another folder is refused before any model is read
    runs = [_encode(cfg)] if cfg.processes == 1 else _encode_in_processes(cfg)
    encoded, seconds = sum(clips for clips, _ in runs), max(seconds for _, seconds in runs)
    report = feature_report(output)
    if report["complete"] and not report["clips"]:
        last = report["skipped"][-1]
        raise DataError(f"{output}: no clip could be used (the last: {last['reason']}); mend the input, delete this")
    identity = require_feature_index(output)["identity"]
    return {
        "output": str(output),
        **report,
        "skipped": len(report["skipped"]),
        "seconds": round(seconds, 1),
        "clips_per_second": round(encoded / seconds, 3) if encoded else None,
        "scaling": {name: identity[name] for name in ("shift", "scale")},
    }


def _encode(cfg: DictConfig, process: int = 0) -> tuple[int, float]:
    """What falls to this process; gives how many clips it encoded, and the seconds that this took."""
    device = choose_device(cfg.device)
    if cfg.processes > 1 and device.type != "cpu" and device.index is None:
        device = torch.device(device.type, process % backend(device).device_count())
    output = Path(to_absolute_path(cfg.output))
    vae = build_vae(cfg.vae)
    if vae.origin is None:
        raise UsageError("this VAE has random weights, and what it encodes nothing can decode; give checkpoint=FILE")
    source = _source(cfg, vae)
    text = None if cfg.get("text") is None else instantiate(cfg.text)
    with folder_lock(output, _SCALING_LOCK):
        encoder = FeatureEncoder(
            _codec(cfg, vae, source, output, device),
            text,
            posterior=cfg.posterior,
            dtype=cfg.dtype,
            device=device,
            precision=cfg.precision,
        )
        writer = FeatureWriter(
            output,
            encoder.identity,
            clips=len(source),
            origin=f"{source.fingerprint()} precision={cfg.precision}",
            shard_clips=cfg.shard_clips,
            part=cfg.part * cfg.processes + process,
            parts=cfg.parts * cfg.processes,
            empty=encoder.empty(),
            vae_origin=str(Path(vae.origin).absolute()),
        )
    begun = time.monotonic()
    encoded = encode_features(source, encoder, writer, cfg.batch_size, cfg.workers)
    return encoded, time.monotonic() - begun


def _source(cfg: DictConfig, vae: VideoVAE) -> ClipSource:
    """The clips, always the same frames of each, in sizes that the VAE takes."""
    always = {"random_start": False, "flip": False}
    path = to_absolute_path(cfg.input)
    if cfg.get("buckets") is None:
        vae.check_size(cfg.clip.frames, cfg.clip.height, cfg.clip.width)
        return ShardClips(path, **cfg.clip, **always)
    rule = instantiate(cfg.buckets, time_stride=vae.time_stride, space_stride=vae.space_stride)
    source = BucketClips(path, rule, stride=cfg.clip.stride, fps=cfg.clip.fps, min_clips=cfg.min_clips, **always)
    for reason, clips in source.dropped.items():
        log.info("%s: %d clips left out, %s", path, clips, reason)
    return source


def _codec(cfg: DictConfig, vae: VideoVAE, source: ClipSource, output: Path, device: torch.device) -> LatentCodec:
    """The VAE with its scaling: the given one, else what the folder says, else the published one, else measured."""
    latent: Any = OmegaConf.to_container(cfg.latent, resolve=True)
    shift, scale = latent["shift"], latent["scale"]
    if cfg.scaling_from is not None:
        if shift is not None or scale is not None:
            raise UsageError("scaling_from=DIR says the shift and scale of the latents; leave out latent.shift, .scale")
        return LatentCodec(vae, *read_scaling(Path(to_absolute_path(cfg.scaling_from)), vae))
    if shift is not None or scale is not None:
        return LatentCodec(vae, shift, scale)
    if load_feature_index(output) is not None:
        return LatentCodec(vae, *read_scaling(output, vae))
    if vae.scaling is not None:
        return LatentCodec(vae)
    clips, batch = cfg.latent.scaling_clips, cfg.batch_size
    scaling = measure_source_scaling(source, vae, clips, batch_size=batch, device=device, precision=cfg.precision)
    return LatentCodec(vae, *scaling)


def _encode_in_processes(cfg: DictConfig) -> list[tuple[int, float]]:
    """`_encode` in processes of their own. Raises what the first of them that fails has raised."""
    threads = max(1, torch.get_num_threads() // cfg.processes)
    logging_config = OmegaConf.to_container(HydraConfig.get().job_logging, resolve=True)
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # it tells that it ends the others
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    job = (OmegaConf.to_container(cfg, resolve=True), threads, logging_config, queue)
    died = None
    try:
        multiprocessing.spawn(_one_process, args=job, nprocs=cfg.processes)
    except multiprocessing.ProcessExitedException as error:
        died = error
    results = []
    while not queue.empty():
        results.append(queue.get())
    for result in results:
        if isinstance(result, OspError):
            raise result
    if died is not None:
        raise DataError(
            f"a process has ended ({died}): out of memory, or ended from outside; "
            "use fewer processes or a smaller batch_size. The same command goes on"
        )
    return results


def _one_process(process: int, cfg: dict[str, Any], threads: int, logging_config: Any, queue: Any) -> None:
    configure_log(OmegaConf.create(logging_config))
    torch.set_num_threads(threads)
    try:
        queue.put(_encode(OmegaConf.create(cfg), process))
    except Exception as error:
        if (mended := user_error(error, "cache")) is None:
            raise
        queue.put(mended)
        raise SystemExit(mended.exit_code) from error
