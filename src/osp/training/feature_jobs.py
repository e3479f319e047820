"""A folder of features, made from a folder of clips by this process or by several."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

from osp.conditioning import TextEncoder
from osp.data.buckets import BucketRule
from osp.data.features.format import load_feature_index, require_feature_index
from osp.data.features.writer import FeatureWriter, feature_report
from osp.data.media.limits import DEFAULT_LIMITS, Limits
from osp.data.sources import BucketClips, ClipSource, ShardClips
from osp.devices import choose_device
from osp.devices.device import backend
from osp.errors import DataError, OspError, UsageError
from osp.files import folder_lock
from osp.parallel.exchange import Exchange
from osp.parallel.launch import on_devices
from osp.training.encode_features import FeatureEncoder, encode_features, measure_source_scaling, read_scaling
from osp.training.encoding_together import ClipEncoder
from osp.vae import LatentCodec, Tiling, VideoVAE

log = logging.getLogger(__name__)

# Held while the scale is measured: whoever comes first does it, and the others read it in the index.
_SCALING_LOCK = ".scaling.lock"


@dataclass(frozen=True)
class FeatureJob:
    """All that decides about a folder of features and who makes it, except for the models.

    Args:
        input: a folder of clips, or a file; None: the models come with a source.
        clip: `frames`, `height`, `width`, `stride` and `fps` of each; with a rule for shapes the last two alone count.
        shift, scale: of the latents; both None: those of `scaling_from`, another folder of features, else the
            folder's own, else the published ones, else measured over `scaling_clips`.
        part, parts: of the work of `processes` each.
        devices: that encode each batch together, where there is one process.
        tiling: that the VAE takes frames in; None: whole frames.
        limits: what one file may cost.
        where: a condition on the clips of `input`; others are left out.
        aesthetic_words: captions get a sentence on the clip's aesthetic score.
    """

    input: Path | None
    output: Path
    clip: Mapping[str, Any]
    min_clips: int
    posterior: str
    dtype: str
    shift: Any
    scale: Any
    scaling_clips: int
    scaling_from: Path | None
    batch_size: int
    workers: int
    shard_clips: int
    processes: int
    part: int
    parts: int
    device: str
    precision: str
    limits: Limits = DEFAULT_LIMITS
    devices: int = 1
    tiling: Tiling | None = None
    where: str | None = None
    aesthetic_words: bool = False


@dataclass(frozen=True)
class FeatureModels:
    """The models that encode: a VAE, a text encoder or none, the rule that gives clips their shape or none."""

    vae: VideoVAE
    text: TextEncoder | None
    rule: BucketRule | None
    source: ClipSource | None = None  # the clips, where `input` says none


Load = Callable[[bool], FeatureModels]
"""Gives the models that encode: all of them, or the VAE alone."""


def make_features(job: FeatureJob, load: Load, set_up: Callable[[], None] | None = None) -> dict[str, Any] | None:
    """Encode what is not encoded yet; gives what the folder holds now, None in all processes of torchrun but the first.

    `load` gives each process its models, after `set_up` in those that are started here; both go there by pickling.
    Raises UsageError before any work for a folder that was begun otherwise, DataError if no clip can be used.
    """
    load_feature_index(job.output)  # another folder is refused before any model is read
    if job.processes == 1:
        runs = on_devices(job.devices, choose_device(job.device), _encode_on, job, load)
    else:
        runs = _encode_in_processes(job, load, set_up)
    if runs is None:
        return None
    encoded, seconds = sum(clips for clips, _ in runs), max(seconds for _, seconds in runs)
    report = feature_report(job.output)
    if report["complete"] and not report["clips"]:
        last = report["skipped"][-1]
        raise DataError(f"{job.output}: no clip could be used (last: {last['reason']}); mend the input, delete this")
    identity = require_feature_index(job.output)["identity"]
    return {
        "output": str(job.output),
        **report,
        "skipped": len(report["skipped"]),
        "seconds": round(seconds, 1),
        "clips_per_second": round(encoded / seconds, 3) if encoded else None,
        "scaling": {name: identity[name] for name in ("shift", "scale")},
    }


def _encode_on(device: torch.device, job: FeatureJob, load: Load) -> list[tuple[int, float]]:
    """`encode_part` on a device, with the other processes of the group if there are any."""
    over = Exchange() if job.devices > 1 else None
    if over is None or over.rank == 0:
        return [encode_part(job, load(True), device, over=over)]
    vae = load(False).vae.eval()
    vae.tiling = job.tiling
    ClipEncoder(vae, device, job.precision, over).assist()
    return []


def encode_part(
    job: FeatureJob, models: FeatureModels, device: torch.device, process: int = 0, over: Exchange | None = None
) -> tuple[int, float]:
    """Encode what falls to a process; gives how many clips it encoded, and the seconds that this took."""
    vae = models.vae
    vae.tiling = job.tiling
    if job.tiling is not None:
        job.tiling.check(vae.space_stride)
    if vae.origin is None:
        raise UsageError("this VAE has random weights, and what it encodes nothing can decode; give checkpoint=FILE")
    source = _source(job, models)
    with folder_lock(job.output, _SCALING_LOCK):
        codec = _codec(job, vae, source, device)
        how: dict[str, Any] = {
            "posterior": job.posterior,
            "dtype": job.dtype,
            "device": device,
            "precision": job.precision,
            "over": over,
        }
        encoder = FeatureEncoder(codec, models.text, **how)
        writer = FeatureWriter(
            job.output,
            encoder.identity,
            clips=len(source),
            origin=f"{source.fingerprint()} precision={job.precision}{_tiles(job.tiling)}",
            shard_clips=job.shard_clips,
            part=job.part * job.processes + process,
            parts=job.parts * job.processes,
            empty=encoder.empty(),
            vae_origin=str(Path(vae.origin).absolute()),
        )
    if process == job.part == 0:
        source.summary().log()
        _warn_of_idle(writer)
    begun = time.monotonic()
    encoded = encode_features(source, encoder, writer, job.batch_size, job.workers)
    encoder.encode.finish()
    return encoded, time.monotonic() - begun


def _tiles(tiling: Tiling | None) -> str:
    return "" if tiling is None else f" tiles={tiling.size}/{tiling.overlap}"


def _warn_of_idle(writer: FeatureWriter) -> None:
    """Each process writes whole shards, so that there is nothing to do for some where there are few."""
    if writer.shards < writer.parts:
        clips = max(1, writer.clips // writer.parts)
        told = (
            "%d shards of %d clips for %d processes: some have nothing to do; a new folder with shard_clips=%d has more"
        )
        log.warning(told, writer.shards, writer.shard_clips, writer.parts, clips)


def _source(job: FeatureJob, models: FeatureModels) -> ClipSource:
    """The clips, always the same frames of each, in sizes that the VAE takes."""
    if job.input is None:
        if models.source is None:
            raise UsageError("there are no clips to encode; give input=FOLDER, or data=NAME")
        return models.source
    clip = job.clip
    always: dict[str, Any] = {"random_start": False, "flip": False, "limits": job.limits}
    always |= {"where": job.where, "aesthetic_words": job.aesthetic_words}
    if models.rule is None:
        models.vae.check_size(clip["frames"], clip["height"], clip["width"])
        return ShardClips(job.input, **clip, **always)
    rate = {"stride": clip["stride"], "fps": clip["fps"]}
    return BucketClips(job.input, models.rule, **rate, min_clips=job.min_clips, **always)


def _codec(job: FeatureJob, vae: VideoVAE, source: ClipSource, device: torch.device) -> LatentCodec:
    """The VAE with its scaling, which comes from where `FeatureJob` says."""
    is_given = job.shift is not None or job.scale is not None
    if job.scaling_from is not None:
        if is_given:
            raise UsageError("scaling_from=DIR says the shift and scale of the latents; leave out latent.shift, .scale")
        return LatentCodec(vae, *read_scaling(job.scaling_from, vae))
    if is_given:
        return LatentCodec(vae, job.shift, job.scale)
    if load_feature_index(job.output) is not None:
        return LatentCodec(vae, *read_scaling(job.output, vae))
    if vae.scaling is not None:
        return LatentCodec(vae)
    how: dict[str, Any] = {"batch_size": job.batch_size, "device": device, "precision": job.precision}
    return LatentCodec(vae, *measure_source_scaling(source, vae, job.scaling_clips, **how))


def _encode_in_processes(job: FeatureJob, load: Load, set_up: Callable[[], None] | None) -> Sequence[tuple[int, float]]:
    """`encode_part` in processes of their own. Raises what the first of them that fails has raised."""
    threads = max(1, torch.get_num_threads() // job.processes)
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # it tells that it ends the others
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    died = None
    try:
        multiprocessing.spawn(_one_process, args=(job, load, set_up, threads, queue), nprocs=job.processes)
    except multiprocessing.ProcessExitedException as error:
        died = error
    results = []
    while not queue.empty():
        results.append(queue.get())
    for result in results:
        if isinstance(result, Exception):
            raise result
    if died is not None:
        raise DataError(
            f"a process has ended ({died}): out of memory, or ended from outside; "
            "use fewer processes or a smaller batch_size. The same command goes on"
        )
    return results


def _one_process(
    process: int,
    job: FeatureJob,
    load: Load,
    set_up: Callable[[], None] | None,
    threads: int,
    queue: Any,
) -> None:
    if set_up is not None:
        set_up()
    torch.set_num_threads(threads)
    try:
        device = choose_device(job.device)
        if device.type != "cpu" and device.index is None:
            device = torch.device(device.type, process % backend(device).device_count())
        queue.put(encode_part(job, load(True), device, process))
    except (OspError, OSError) as error:
        queue.put(error)
        raise SystemExit(1) from error
