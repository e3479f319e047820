"""Run a VAE over clips and write what it loses: numbers for each clip, a contact sheet, videos side by side.

Clips may have different sizes: each is measured in its own, and means are over clips, whatever their length. A long
video goes through in pieces (`osp.evaluation.pieces`). The Frechet distance is over clips, each in its own size; of
videos in pieces it is over runs of 16 frames, and `frechet.clips_are` says so.

Files, each replaced as a whole:
    metrics.json: what `evaluate_reconstruction` returns, with `mean` and `std` (of the population) over clips,
        `frechet`, `baselines`, `psnr_gain` (dB of the model over each baseline), `counts`, `clips`, `skipped`. A value
        that a clip does not have (flicker of an image) is null and does not count in the mean.
    metrics.csv: a row a clip, then the row `mean`.
    contact_sheet.png: the first `contact_sheet_clips` clips.
    reconstructions/NUMBER-KEY.mp4: input and reconstruction side by side of the first `save_videos` clips; a PNG for a
        single frame. Those of an earlier evaluation go.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean, pstdev
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from osp.checks import check_number
from osp.data.media.shape import Strides
from osp.data.media.video import ClipError, to_float, to_uint8
from osp.devices import autocast_dtype
from osp.documents import printable
from osp.errors import DataError, UsageError
from osp.evaluation.frechet import FrechetDistance, VideoFeatures, frechet_record
from osp.evaluation.lpips import PerceptualDistance
from osp.evaluation.metrics import clip_metrics, psnr
from osp.evaluation.output import begin, save_clip, write_results
from osp.evaluation.pieces import (
    WINDOW,
    PieceErrors,
    PieceFeatures,
    PieceMetrics,
    ShownFrames,
    reconstruct_pieces,
)
from osp.report.contact_sheet import SheetClip, draw_contact_sheet
from osp.report.tables import csv_text

logger = logging.getLogger(__name__)

PAIRS = "reconstructions"
NO_BASELINES: Mapping[str, "VideoAutoencoder"] = MappingProxyType({})
NO_SETTINGS: Mapping[str, Any] = MappingProxyType({})


class Posterior(Protocol):
    """The distribution of a latent, as an encoder returns it."""

    def mode(self) -> Tensor:
        """The latent, `B L T H W`."""
        ...


class VideoAutoencoder(Protocol):
    """A model to evaluate. It takes any number of frames, and heights and widths that are multiples of `strides.space`.

    A clip comes back with its own number of frames or with as many as its latent decodes to.
    """

    @property
    def strides(self) -> Strides:
        """Down-sampling in time and space."""
        ...

    def encode(self, video: Tensor) -> Posterior:
        """Video `B C T H W` in [-1, 1] -> posterior of the latent."""
        ...

    def decode(self, latent: Tensor) -> Tensor:
        """Latent -> video `B C T H W`."""
        ...


def reconstruct(vae: VideoAutoencoder, video: Tensor, autocast: torch.dtype | None = None) -> Tensor:
    """`B C T H W` in [-1, 1] -> its reconstruction from the posterior's mode, float32, clamped; NaN where not finite.

    Raises UsageError if that has another shape.
    """
    with torch.no_grad(), torch.autocast(video.device.type, dtype=autocast, enabled=autocast is not None):
        reconstruction = vae.decode(vae.encode(video).mode()).float()
    if reconstruction.shape[2] == video.shape[2] + vae.strides.missing_frames(video.shape[2]):
        reconstruction = reconstruction[:, :, : video.shape[2]]  # without what filled the last stride
    _check_shape(vae, reconstruction, video)
    return torch.where(reconstruction.isfinite(), reconstruction.clamp(-1, 1), math.nan)


def _check_shape(vae: VideoAutoencoder, reconstruction: Tensor, video: Tensor) -> None:
    if reconstruction.shape != video.shape:
        raise UsageError(
            f"{type(vae).__name__} gives {_shape(reconstruction)} for a video of {_shape(video)} (B C T H W)"
        )


def check_finite(video: Tensor, clip: object) -> None:
    """Raise DataError naming the clip if a model has given NaN or infinity for it."""
    if not bool(video.isfinite().all()):
        raise DataError(
            f"{printable(clip)}: the model gives numbers that are not finite (NaN or infinity); take another "
            "checkpoint, or precision=32-true"
        )


@dataclass(frozen=True)
class _Networks:
    """The networks that run on the device."""

    vae: VideoAutoencoder
    baselines: Mapping[str, VideoAutoencoder]
    perceptual: PerceptualDistance | None
    features: VideoFeatures | None
    device: torch.device
    autocast: torch.dtype | None

    def __post_init__(self) -> None:
        for network in (self.vae, *self.baselines.values(), self.perceptual, self.features):
            if isinstance(network, nn.Module):
                network.to(self.device).eval()

    @property
    def context(self) -> Callable[[], AbstractContextManager[Any]]:
        """The precision that models run in, as a context."""
        return partial(torch.autocast, self.device.type, dtype=self.autocast, enabled=self.autocast is not None)

    def check_sides(self, height: int, width: int) -> None:
        """Raises UsageError for clips of a height or width that one of the networks does not take."""
        for vae in (self.vae, *self.baselines.values()):
            vae.strides.check_sides(height, width, f"the stride of {type(vae).__name__}")

    def check_size(self, frames: int, height: int, width: int) -> None:
        """Raises UsageError for clips of a size that one of the networks does not take."""
        self.check_sides(height, width)
        if self.features is not None and frames < self.features.min_frames:
            raise UsageError(f"frames={frames}: {self.features.name} needs at least {self.features.min_frames} frames")


@dataclass(frozen=True)
class _Keep:
    """Where results go, and how many clips are shown on the contact sheet and kept as videos."""

    folder: Path
    sheet_clips: int
    videos: int


@dataclass
class _Run:
    """The records, features and pictures gathered so far."""

    frechet: FrechetDistance | None = None
    records: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    sheet: list[SheetClip] = field(default_factory=list)
    in_pieces: bool = False  # whether any video has gone through in pieces

    def skip(self, clip: str, reason: str) -> None:
        logger.warning("clip skipped: %s: %s", clip, reason)
        self.skipped.append({"clip": clip, "reason": reason})


def evaluate_reconstruction(
    vae: VideoAutoencoder,
    clips: Iterable[Mapping[str, Any] | ClipError],
    *,
    output: str | Path,
    model_name: str,
    device: str | torch.device = "cpu",
    precision: str = "32-true",
    batch_size: int = 1,
    perceptual: PerceptualDistance | None = None,
    features: VideoFeatures | None = None,
    baselines: Mapping[str, VideoAutoencoder] = NO_BASELINES,
    contact_sheet_clips: int = 8,
    save_videos: int = 0,
    settings: Mapping[str, Any] = NO_SETTINGS,
) -> dict[str, Any]:
    """Encode (mode) and decode every clip, measure, write the results into the folder `output`, and return them.

    Each clip is a mapping with `video` (uint8 `C T H W`), `key`, `fps` and perhaps `caption`, or the `ClipError` of a
    clip that could not be read, which is counted and listed. In the place of `video` a clip may have `pieces`: an
    iterator of uint8 `C T H W` of one height and width, which goes through in bounded memory. Networks that are modules
    are moved to `device` and put into eval mode. `precision` is one of Lightning's `32-true`, `bf16-mixed`,
    `16-mixed`; metrics are always computed in float32, the Frechet distance in float64.
    `baselines` reconstruct the same clips and are compared by PSNR. `settings` is copied into the results.

    Raises:
        UsageError: a setting, or the clips' size, does not fit the networks.
        DataError: no clip could be evaluated, a reconstruction is not finite, or `output` cannot be made a folder.
        OSError: a file in it cannot be written.
    """
    check_number("batch_size", batch_size, 1, whole=True)
    networks = _Networks(vae, baselines, perceptual, features, torch.device(device), autocast_dtype(precision))
    keep = _Keep(begin(output, PAIRS), contact_sheet_clips, save_videos)
    run = _Run(frechet=None if features is None else FrechetDistance(features.num_features))
    for batch in _batches(clips, batch_size, networks, run):
        if "pieces" in batch[0]:
            _measure_pieces(batch[0], networks, keep, run)
        else:
            _measure(batch, networks, keep, run)
    if not run.records:
        reasons = f"; the first: {run.skipped[0]['clip']}: {run.skipped[0]['reason']}" if run.skipped else ""
        raise DataError(f"no clip could be evaluated: {len(run.skipped)} skipped{reasons}")
    own_settings = {
        "device": str(networks.device),
        "precision": precision,
        "batch_size": batch_size,
        "perceptual": None if perceptual is None else perceptual.name,
        "features": None if features is None else features.name,
    }
    distance = None
    if features is not None and run.frechet is not None:
        distance = frechet_record(run.frechet, features) | {"clips_are": _frechet_clips(run)}
    results = _summary(run, model_name, {**settings, **own_settings}, distance, baselines)
    title = f"{model_name}, clips: {len(run.records)}"
    sheet = draw_contact_sheet(run.sheet, title, _headline(results)) if run.sheet else None
    write_results(keep.folder, results, _table(results), sheet)
    return results


@torch.no_grad()
def _measure(batch: Sequence[Mapping[str, Any]], networks: _Networks, keep: _Keep, run: _Run) -> None:
    """Reconstruct clips of one shape and gather what is found. Raises DataError for one that is not finite."""
    video = to_float(torch.stack([clip["video"] for clip in batch]).to(networks.device))
    reconstruction = reconstruct(networks.vae, video, networks.autocast)
    others = {name: reconstruct(one, video, networks.autocast) for name, one in networks.baselines.items()}
    for i, clip in enumerate(batch):
        check_finite(reconstruction[i], clip["key"])
        record = _record(clip, video.shape[2:], clip_metrics(reconstruction[i], video[i], networks.perceptual))
        record["baselines"] = {name: {"psnr": psnr(other[i], video[i]).item()} for name, other in others.items()}
        _show(clip, clip["video"], record, to_uint8(reconstruction[i]).cpu(), keep, run)
        run.records.append(record)
    if networks.features is not None and run.frechet is not None:
        run.frechet.update(networks.features(video).cpu(), reference=True)
        run.frechet.update(networks.features(reconstruction).cpu(), reference=False)


@torch.no_grad()
def _measure_pieces(clip: Mapping[str, Any], networks: _Networks, keep: _Keep, run: _Run) -> None:
    """Reconstruct a video piece by piece and gather what is found; one that is damaged on its way is skipped."""
    models = [networks.vae, *networks.baselines.values()]
    meters = [PieceMetrics(networks.perceptual), *(PieceErrors() for _ in networks.baselines)]
    features = None if networks.features is None else PieceFeatures(networks.features)
    shown = ShownFrames()
    whole = partial(reconstruct, autocast=networks.autocast)
    try:
        for video, *made in reconstruct_pieces(models, clip["pieces"], networks.device, whole, networks.context):
            _check_shape(networks.vae, made[0], video)
            check_finite(made[0], clip["key"])
            for meter, reconstruction in zip(meters, made, strict=True):
                meter.add(reconstruction[0], video[0])
            if features is not None:
                features.add(video, made[0])
            shown.add(to_uint8(video[0]).cpu(), to_uint8(made[0][0]).cpu())
    except ClipError as error:
        run.skip(error.name, error.reason)
        return
    size = meters[0].frames, *shown.video.shape[2:]
    record = _record(clip, size, meters[0].result())
    found = zip(networks.baselines, meters[1:], strict=True)
    record["baselines"] = {name: {"psnr": meter.result()["psnr"]} for name, meter in found}
    _show(clip, shown.video, record, shown.reconstruction, keep, run)
    run.records.append(record)
    run.in_pieces = True
    if features is not None and run.frechet is not None:
        for real, again in features.finish():
            run.frechet.update(real, reference=True)
            run.frechet.update(again, reference=False)


def _show(
    clip: Mapping[str, Any], video: Tensor, record: Mapping[str, Any], reconstruction: Tensor, keep: _Keep, run: _Run
) -> None:
    """Put the clip on the contact sheet and into a file, if it is one of the first."""
    shown = len(run.records)
    if shown >= max(keep.sheet_clips, keep.videos):
        return
    pair = video, reconstruction
    if shown < keep.sheet_clips:
        run.sheet.append(_sheet_clip(record, *pair))
    if shown < keep.videos:
        key = str(clip["key"])
        name = f"{shown:03d}-{key.removesuffix(Path(key).suffix)}"  # keys may be paths
        save_clip(keep.folder / PAIRS, name, torch.cat([pair[0].cpu(), pair[1]], -1), float(clip["fps"]))


def _batches(
    clips: Iterable[Mapping[str, Any] | ClipError], size: int, networks: _Networks, run: _Run
) -> Iterator[list[Mapping[str, Any]]]:
    """Runs of clips of one shape, in order; broken ones are counted, and a size that does not fit is an error."""
    batch: list[Mapping[str, Any]] = []
    for clip in clips:
        if isinstance(clip, ClipError):
            run.skip(clip.name, clip.reason)
            continue
        if "pieces" in clip:
            networks.check_sides(clip["height"], clip["width"])
            yield from ([batch] if batch else [])
            yield [clip]
            batch = []
            continue
        networks.check_size(*clip["video"].shape[1:])
        if batch and (len(batch) == size or clip["video"].shape != batch[0]["video"].shape):
            yield batch
            batch = []
        batch.append(clip)
    if batch:
        yield batch


def _frechet_clips(run: _Run) -> str:
    """Says what the Frechet distance takes for a clip."""
    sizes = {(record["height"], record["width"]) for record in run.records}
    own = ", each in its own size" if len(sizes) > 1 else ""
    return f"runs of {WINDOW} frames of the videos{own}" if run.in_pieces else f"the clips{own}"


def _record(clip: Mapping[str, Any], size: Sequence[int], metrics: Mapping[str, float | None]) -> dict[str, Any]:
    frames, height, width = size
    about = {"frames": frames, "height": height, "width": width, "fps": float(clip["fps"])}
    return {"key": str(clip["key"]), "caption": clip.get("caption", ""), **about, "metrics": dict(metrics)}


def _summary(
    run: _Run,
    model_name: str,
    settings: Mapping[str, Any],
    frechet: Mapping[str, Any] | None,
    baselines: Iterable[str],
) -> dict[str, Any]:
    columns: dict[str, list[float]] = {}
    for record in run.records:
        for name, value in record["metrics"].items():
            columns.setdefault(name, []).extend([] if value is None else [value])
    mean = {name: fmean(values) if values else None for name, values in columns.items()}
    baseline_psnr = {name: fmean(record["baselines"][name]["psnr"] for record in run.records) for name in baselines}
    frames = sum(record["frames"] for record in run.records)
    return {
        "model": model_name,
        "settings": dict(settings),
        "counts": {"clips": len(run.records), "frames": frames, "skipped": len(run.skipped)},
        "mean": mean,
        "std": {name: pstdev(values) if values else None for name, values in columns.items()},
        "frechet": frechet,
        "baselines": {name: {"psnr": value} for name, value in baseline_psnr.items()},
        "psnr_gain": {name: fmean(columns["psnr"]) - value for name, value in baseline_psnr.items()},
        "clips": run.records,
        "skipped": run.skipped,
    }


def _table(results: Mapping[str, Any]) -> str:
    """The clips as CSV; a baseline's PSNR is the column `psnr_NAME`."""
    metrics = list(results["mean"])
    about = ["key", "frames", "height", "width", "fps"]
    baselines = {f"psnr_{name}": name for name in results["baselines"]}
    rows = []
    for record in results["clips"]:
        others = {column: record["baselines"][name]["psnr"] for column, name in baselines.items()}
        rows.append({key: record[key] for key in about} | record["metrics"] | others)
    others = {column: results["baselines"][name]["psnr"] for column, name in baselines.items()}
    rows.append({"key": "mean", **results["mean"], **others})
    return csv_text([*about, *metrics, *baselines], rows)


# The names of metrics on the contact sheet, if they are not their keys.
TITLES = {"psnr": "PSNR", "ssim": "SSIM", "ms_ssim": "MS-SSIM", "lpips": "LPIPS", "rfvd": "rFVD"}


def _written(metrics: Mapping[str, float | None]) -> list[str]:
    return [
        f"{TITLES.get(name, name)} {value:.2f} dB" if name == "psnr" else f"{TITLES.get(name, name)} {value:.4f}"
        for name, value in metrics.items()
        if value is not None
    ]


def _sheet_clip(record: Mapping[str, Any], video: Tensor, reconstruction: Tensor) -> SheetClip:
    size = "x".join(str(record[name]) for name in ("frames", "height", "width"))
    shown = {name: value for name, value in record["metrics"].items() if not name.startswith(("ms_ssim", "flicker"))}
    return SheetClip.compare(record["key"], "   ".join([*_written(shown), size]), video, reconstruction)


def _headline(results: Mapping[str, Any]) -> list[str]:
    """The lines under the contact sheet's title."""
    parts = _written(results["mean"])
    parts += [f"{gain:+.2f} dB over {name}" for name, gain in results["psnr_gain"].items()]
    frechet = results["frechet"] or {}
    parts += [f"{TITLES.get(name, name)} {value:.4g}" for name, value in frechet.items() if isinstance(value, float)]
    return [f"mean: {parts[0]}", *parts[1:]]


def _shape(video: Tensor) -> str:
    return "x".join(str(size) for size in video.shape)
