"""Judge generated videos and write what was found: do they show their prompts, how far are they from real ones."""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from osp.data.media.video import ClipError, to_float, to_uint8
from osp.data.procedural.oracle import UNKNOWN, Reading
from osp.devices import autocast_dtype
from osp.errors import DataError, UsageError
from osp.evaluation.frechet import FrechetDistance, VideoFeatures, frechet_record
from osp.evaluation.metrics import psnr
from osp.evaluation.output import begin, save_clip, write_results
from osp.evaluation.prompt_accuracy import CHANCE, PARTS, Judgement, accuracy, judge, shuffled_accuracy, truth
from osp.evaluation.reconstruction import NO_SETTINGS, VideoAutoencoder, reconstruct
from osp.report.contact_sheet import SheetClip, draw_contact_sheet
from osp.report.tables import csv_text

logger = logging.getLogger(__name__)

VIDEOS = "videos"
"""The folder of generated videos in an evaluation's output."""


@dataclass(frozen=True)
class GeneratedClip:
    """A generated video `C T H W`, uint8 or float in [-1, 1], and what it was made of.

    `real` (uint8 `C T H W`) is the clip whose frames were given to the generator, if any were.
    """

    key: str
    prompt: str
    video: Tensor
    fps: float
    seed: int | None = None
    real: Tensor | None = None


@dataclass
class _Judged:
    """One set of videos: what the oracle says of each, and their features."""

    judgements: list[Judgement] = field(default_factory=list)
    features: list[Tensor] = field(default_factory=list)

    def add(self, video: Tensor, prompt: str, features: VideoFeatures) -> Judgement:
        """A float video `C T H W`; one that is not finite shows nothing, and has no features."""
        finite = bool(video.isfinite().all())
        judgement = judge(video, prompt) if finite else Judgement(prompt, truth(prompt), UNKNOWN)
        self.judgements.append(judgement)
        if finite:
            self.features.append(features(video[None]).cpu())
        return judgement


@torch.no_grad()
def evaluate_generation(
    generated: Iterable[GeneratedClip],
    real: Iterable[Mapping[str, Any] | ClipError],
    *,
    output: str,
    model_name: str,
    features: VideoFeatures,
    vae: VideoAutoencoder | None = None,
    given: Sequence[int] = (),
    device: str | torch.device = "cpu",
    precision: str = "32-true",
    contact_sheet_clips: int = 16,
    save_videos: int | None = None,
    settings: Mapping[str, Any] = NO_SETTINGS,
) -> dict[str, Any]:
    """Judge every generated video beside real ones, write the results into the folder `output`, and return them.

    `real` clips are mappings as `evaluate_reconstruction` takes them, with captions. Of N generated videos the first N
    real clips are the counterpart: they are judged against their captions, which is the best that the oracle lets
    anyone reach, and again as the `vae` reconstructs them, which is the best that a model of its latents can. The next
    clips, N at most, are the reference of the Frechet distance: of the generated videos, of the reconstructions, and of
    the first N real clips themselves, which is the floor. Without any the counterpart is the reference, and there is no
    floor. `given` are the numbers of the frames that the generator was given from each clip's `real`.

    Networks that are modules are moved to `device`. `precision` is the VAE's. `save_videos` is how many are written,
    None: all. `settings` is copied into the results.

    Files, each replaced as a whole:
        metrics.json: what is returned. `accuracy` has rates in 0..1 of `all` three and of each part: of `generated`,
            `real` and `vae` with Wilson's 95 % interval; `chance`, exact; `generated_shuffled` and `real_shuffled`, of
            the same videos with each other's prompts. `frechet` has the distance under its name, that of the `vae`'s
            reconstructions, and the `floor`. `given` has PSNR (dB, mean over clips) of the frames given, in the
            generated videos and in the VAE's reconstructions, and how much the first is below the second (`loss`): of
            all of a clip's together, and `by_frame`.
        metrics.csv: a row a prompt.
        contact_sheet.png: the first `contact_sheet_clips` videos, marked right or wrong.
        videos/NUMBER-KEY.mp4: a PNG for a single frame. Those of an earlier evaluation go.

    Raises:
        UsageError: a prompt or caption does not name one object by colour, shape and motion; a size does not fit.
        DataError: nothing was generated, no real clip could be read, or `output` cannot be made a folder.
        OSError: a file in it cannot be written.
    """
    device, autocast, folder = torch.device(device), autocast_dtype(precision), begin(output, VIDEOS)
    for network in (vae, features):
        if isinstance(network, nn.Module):
            network.to(device).eval()

    made = _Judged()
    records: list[dict[str, Any]] = []
    sheet: list[SheetClip] = []
    for number, clip in enumerate(generated):
        _check_frames(clip.video, features)
        video = _on(device, clip.video)
        judgement = made.add(video, clip.prompt, features)
        record: dict[str, Any] = {"key": clip.key, "prompt": clip.prompt, "seed": clip.seed, **_verdict(judgement)}
        record["finite"] = bool(video.isfinite().all())
        if given:
            record |= _given_psnr(clip, video, given, vae, autocast)
        pixels = to_uint8(video.nan_to_num(0.0)).cpu()
        if save_videos is None or number < save_videos:
            record["file"] = f"{VIDEOS}/{save_clip(folder / VIDEOS, f'{number:03d}-{clip.key}', pixels, clip.fps).name}"
        if number < contact_sheet_clips:
            sheet.append(SheetClip.show(clip.prompt, _label(record), pixels, record["right"]["all"]))
        records.append(record)
    if not records:
        raise DataError("nothing was generated, so there is nothing to evaluate")

    shown, reconstructed = _Judged(), _Judged()
    skipped: list[dict[str, str]] = []
    others: list[Tensor] = []
    for original in _readable(real, 2 * len(records), skipped):
        _check_frames(original["video"], features)
        video = _on(device, original["video"])
        if len(shown.judgements) == len(records):
            others.append(features(video[None]).cpu())
            continue
        shown.add(video, original["caption"], features)
        if vae is not None:
            reconstructed.add(reconstruct(vae, video[None], autocast)[0], original["caption"], features)
    if not shown.judgements:
        reasons = f"; the first: {skipped[0]['clip']}: {skipped[0]['reason']}" if skipped else ""
        raise DataError(f"no real clip could be read: {len(skipped)} skipped{reasons}")

    sets = {"generated": made, "real": shown} | ({"vae": reconstructed} if vae is not None else {})
    results = {
        "model": model_name,
        "settings": {**settings, "device": str(device), "precision": precision, "features": features.name},
        "counts": {
            "generated": len(records),
            "not_finite": sum(not record["finite"] for record in records),
            "real": len(shown.judgements),
            "further_real": len(others),
            "skipped": len(skipped),
        },
        "accuracy": _accuracies(sets),
        "frechet": _frechet(made, shown, reconstructed, others, features),
        "given": _given(records, given),
        "clips": records,
        "skipped": skipped,
    }
    picture = draw_contact_sheet(sheet, f"{model_name}, prompts: {len(records)}", headline(results)) if sheet else None
    write_results(folder, results, _table(records), picture)
    return results


def headline(results: Mapping[str, Any]) -> list[str]:
    """The results in a few short parts, as they stand above the contact sheet."""
    rates = results["accuracy"]["generated"]
    whole = rates["all"]
    parts = [f"prompt accuracy {whole['rate']:.1%} ({whole['low']:.1%} to {whole['high']:.1%})"]
    parts += [f"{part} {rates[part]['rate']:.1%}" for part in PARTS]
    ceilings = {"real": "real clips", "vae": "their reconstructions"}
    parts += [
        f"{called} {results['accuracy'][name]['all']['rate']:.1%}"
        for name, called in ceilings.items()
        if name in results["accuracy"]
    ]
    parts.append(f"chance {results['accuracy']['chance']['all']:.1%}")
    name, *_ = frechet = results["frechet"]
    distances = {key: frechet[key] for key in (name, "floor") if frechet.get(key) is not None}
    parts += [f"{'real to real' if key == 'floor' else key} {value:.4g}" for key, value in distances.items()]
    if results["given"] is not None:
        parts.append(f"given frames {results['given']['psnr']:.2f} dB")
    return parts


def _on(device: torch.device, video: Tensor) -> Tensor:
    video = video.to(device)
    return video.float() if video.is_floating_point() else to_float(video)


def _check_frames(video: Tensor, features: VideoFeatures) -> None:
    if video.shape[1] < features.min_frames:
        raise UsageError(f"frames={video.shape[1]}: {features.name} needs at least {features.min_frames} frames")


def _readable(
    clips: Iterable[Mapping[str, Any] | ClipError], most: int, skipped: list[dict[str, str]]
) -> Iterator[Mapping[str, Any]]:
    """The first so many that could be read; the others are noted."""

    def good() -> Iterator[Mapping[str, Any]]:
        for clip in clips:
            if isinstance(clip, ClipError):
                logger.warning("clip skipped: %s", clip)
                skipped.append({"clip": clip.name, "reason": clip.reason})
            else:
                yield clip

    return islice(good(), most)


def _verdict(judgement: Judgement) -> dict[str, Any]:
    return {"asked": _words(judgement.truth), "read": _words(judgement.seen), "right": judgement.right()}


def _words(reading: Reading) -> dict[str, str | None]:
    return {part: getattr(reading, part) for part in PARTS}


def _label(record: Mapping[str, Any]) -> str:
    read = " ".join(word or "?" for word in record["read"].values())
    kept = f"   given frames {record['given_psnr']:.1f} dB" if "given_psnr" in record else ""
    return f"read: {read}{kept}"


def _given_psnr(
    clip: GeneratedClip, video: Tensor, given: Sequence[int], vae: VideoAutoencoder | None, autocast: torch.dtype | None
) -> dict[str, Any]:
    """PSNR of the frames that were given, together and each, in the generated video and in the VAE's reconstruction."""
    if clip.real is None:
        raise UsageError(f"{clip.key}: frames are said to be given, but not the clip that they are from")
    real, frames = _on(video.device, clip.real), list(given)
    shown = {"given": video.nan_to_num(0.0)}
    if vae is not None:
        shown["vae"] = reconstruct(vae, real[None], autocast)[0]
    kept: dict[str, Any] = {}
    for name, clips in shown.items():
        kept[f"{name}_psnr"] = psnr(clips[:, frames], real[:, frames]).item()
        kept[f"{name}_psnr_by_frame"] = [psnr(clips[:, frame], real[:, frame]).item() for frame in frames]
    return kept


def _accuracies(sets: Mapping[str, _Judged]) -> dict[str, Any]:
    rates: dict[str, Any] = {
        name: {part: rate.plain() for part, rate in accuracy(judged.judgements).items()}
        for name, judged in sets.items()
    }
    rates["chance"] = dict(CHANCE)
    for name in ("generated", "real"):
        measured = shuffled_accuracy(sets[name].judgements)
        rates[f"{name}_shuffled"] = {part: None if math.isnan(rate) else rate for part, rate in measured.items()}
    return rates


def _frechet(
    made: _Judged, shown: _Judged, reconstructed: _Judged, others: Sequence[Tensor], features: VideoFeatures
) -> dict[str, Any]:
    """Generated to real, first; the name of the network's distance goes without the "r" of a reconstruction's."""
    reference = others
    if len(others) < 2:
        reference = shown.features
        logger.warning("no real clips beyond those of the prompts: %s is the distance to these", features.name)
    record = frechet_record(_distance(reference, made.features, features), features)
    return {
        features.name.replace("rfvd", "fvd"): record.pop(features.name),
        "floor": None if reference is shown.features else _finite(_distance(reference, shown.features, features)),
        "vae": _finite(_distance(reference, reconstructed.features, features)),
        **record,
        "reference_clips": len(reference),
    }


def _finite(distance: FrechetDistance) -> float | None:
    value = float(distance.compute())
    return value if math.isfinite(value) else None


def _distance(reference: Sequence[Tensor], other: Sequence[Tensor], features: VideoFeatures) -> FrechetDistance:
    distance = FrechetDistance(features.num_features)
    for vector in reference:
        distance.update(vector, reference=True)
    for vector in other:
        distance.update(vector, reference=False)
    return distance


def _given(records: Sequence[Mapping[str, Any]], given: Sequence[int]) -> dict[str, Any] | None:
    if not given:
        return None
    by_frame: list[dict[str, Any]] = [{"frame": frame} for frame in given]
    about: dict[str, Any] = {"frames": list(given)}
    for name, key in (("psnr", "given_psnr"), ("vae_psnr", "vae_psnr")):
        if key in records[0]:
            about[name] = fmean(record[key] for record in records)
            for number, frame in enumerate(by_frame):
                frame[name] = fmean(record[f"{key}_by_frame"][number] for record in records)
    for each in (about, *by_frame):
        if "vae_psnr" in each:
            each["loss"] = each["vae_psnr"] - each["psnr"]
    return about | {"by_frame": by_frame}


def _table(records: Sequence[Mapping[str, Any]]) -> str:
    """The prompts as CSV: what each asks for, what was read, and whether that is right."""
    words = [column for part in PARTS for column in (part, f"{part}_read", f"{part}_right")]
    kept = [name for name in ("given_psnr", "vae_psnr") if name in records[0]]
    rows = []
    for record in records:
        row = {name: record.get(name) for name in ("key", "prompt", "seed", *kept, "file")}
        for part in PARTS:
            row[part], row[f"{part}_read"] = record["asked"][part], record["read"][part]
            row[f"{part}_right"] = record["right"][part]
        rows.append(row | {"right": record["right"]["all"]})
    return csv_text(["key", "prompt", "seed", *words, "right", *kept, "file"], rows)
