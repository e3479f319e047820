"""Judge generated videos and write what was found: do they show their prompts, how far are they from real ones.

Of N generated videos the first N real clips are the counterpart: they are judged against their captions, which is the
best that the oracle lets anyone reach, and again as the VAE reconstructs them, which is the best that a model of its
latents can. The next clips, N at most, are the reference of the Frechet distance: of the generated videos, of the
reconstructions, and of the first N real clips themselves, which is the floor. Without any the counterpart is the
reference, and there is no floor.

Files, each replaced as a whole:
    metrics.json: what `evaluate_generation` returns. `accuracy` has rates in 0..1 of `all` three and of each part: of
        `generated`, `real` and `vae` with Wilson's 95 % interval; `chance`, exact; `generated_shuffled` and
        `real_shuffled`, of the same videos with each other's prompts. `frechet` has the distance under its name, that
        of the `vae`'s reconstructions, and the `floor`. `given` has PSNR (dB, mean over clips) of the frames given, in
        the generated videos and in the VAE's reconstructions, and how much the first is below the second (`loss`): of
        all of a clip's together, and `by_frame`.
    metrics.csv: a row a prompt.
    contact_sheet.png: the first `contact_sheet_clips` videos, marked right or wrong.
    videos/NUMBER-KEY.mp4: a PNG for a single frame. Those of an earlier evaluation go.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from osp.data.media.video import ClipError, to_float, to_uint8
from osp.data.procedural.oracle import Reading
from osp.devices import autocast_dtype
from osp.errors import DataError, UsageError
from osp.evaluation.frechet import FrechetDistance, VideoFeatures, frechet_record
from osp.evaluation.metrics import psnr
from osp.evaluation.output import begin, save_clip, write_results
from osp.evaluation.prompt_accuracy import CHANCE, PARTS, Judgement, accuracy, judge, shuffled_accuracy
from osp.evaluation.reconstruction import NO_SETTINGS, VideoAutoencoder, check_finite, reconstruct
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
        """Judge a float video `C T H W`. Raises DataError for one that is not finite."""
        check_finite(video, prompt)
        judgement = judge(video, prompt)
        self.judgements.append(judgement)
        self.features.append(features(video[None]).cpu())
        return judgement


@dataclass(frozen=True)
class _Networks:
    """The networks that videos are judged with, and the numbers of the frames that were given."""

    features: VideoFeatures
    vae: VideoAutoencoder | None
    device: torch.device
    autocast: torch.dtype | None
    given: Sequence[int]

    def placed(self, video: Tensor) -> Tensor:
        """The video as float on the device. Raises UsageError if it has too few frames."""
        least, name = self.features.min_frames, self.features.name
        if video.shape[1] < least:
            raise UsageError(f"frames={video.shape[1]}: {name} needs at least {least} frames")
        return _on(self.device, video)


@dataclass
class _Generated:
    """The generated videos, judged: a record each, and what the contact sheet shows."""

    judged: _Judged = field(default_factory=_Judged)
    records: list[dict[str, Any]] = field(default_factory=list)
    sheet: list[SheetClip] = field(default_factory=list)


@dataclass
class _Real:
    """The prompts' own clips, judged, and as the VAE reconstructs them; features of further clips; what was skipped."""

    shown: _Judged = field(default_factory=_Judged)
    reconstructed: _Judged = field(default_factory=_Judged)
    others: list[Tensor] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)


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

    `real` clips are mappings as `evaluate_reconstruction` takes them, with captions; the module says what they are for.
    `given` are the numbers of the frames that the generator was given from each clip's `real`. Networks that are
    modules are moved to `device`. `precision` is the VAE's. `save_videos` is how many are written, None: all.
    `settings` is copied into the results.

    Raises:
        UsageError: a prompt or caption does not name one object by colour, shape and motion; a size does not fit.
        DataError: nothing was generated, no real clip could be read, or `output` cannot be made a folder.
        OSError: a file in it cannot be written.
    """
    folder = begin(output, VIDEOS)
    networks = _Networks(features, vae, torch.device(device), autocast_dtype(precision), given)
    for network in (vae, features):
        if isinstance(network, nn.Module):
            network.to(networks.device).eval()
    made = _judge_generated(generated, networks, folder, contact_sheet_clips, save_videos)
    beside = _judge_real(real, networks, len(made.records))
    used = {**settings, "device": str(networks.device), "precision": precision, "features": features.name}
    results = {"model": model_name, "settings": used, **_results(made, beside, networks)}
    title = f"{model_name}, prompts: {len(made.records)}"
    picture = draw_contact_sheet(made.sheet, title, headline(results)) if made.sheet else None
    write_results(folder, results, _table(made.records), picture)
    return results


def _judge_generated(
    clips: Iterable[GeneratedClip],
    networks: _Networks,
    folder: Path,
    contact_sheet_clips: int,
    save_videos: int | None,
) -> _Generated:
    """Judge the videos as they come, and write so many of them. Raises DataError if none comes."""
    made = _Generated()
    for number, clip in enumerate(clips):
        video = networks.placed(clip.video)
        judgement = made.judged.add(video, clip.prompt, networks.features)
        record: dict[str, Any] = {"key": clip.key, "prompt": clip.prompt, "seed": clip.seed, **_verdict(judgement)}
        if networks.given:
            record |= _given_psnr(clip, video, networks)
        pixels = to_uint8(video).cpu()
        if save_videos is None or number < save_videos:
            record["file"] = f"{VIDEOS}/{save_clip(folder / VIDEOS, f'{number:03d}-{clip.key}', pixels, clip.fps).name}"
        if number < contact_sheet_clips:
            made.sheet.append(SheetClip.show(clip.prompt, _label(record), pixels, record["right"]["all"]))
        made.records.append(record)
    if not made.records:
        raise DataError("nothing was generated, so there is nothing to evaluate")
    return made


def _judge_real(clips: Iterable[Mapping[str, Any] | ClipError], networks: _Networks, prompts: int) -> _Real:
    """Judge the first `prompts` clips, and take the features of as many more. Raises DataError if none can be read."""
    beside = _Real()
    for original in _readable(clips, 2 * prompts, beside.skipped):
        video = networks.placed(original["video"])
        if len(beside.shown.judgements) == prompts:
            beside.others.append(networks.features(video[None]).cpu())
            continue
        beside.shown.add(video, original["caption"], networks.features)
        if networks.vae is not None:
            again = reconstruct(networks.vae, video[None], networks.autocast)[0]
            beside.reconstructed.add(again, original["caption"], networks.features)
    if not beside.shown.judgements:
        first = beside.skipped[0] if beside.skipped else None
        reasons = f"; the first: {first['clip']}: {first['reason']}" if first else ""
        raise DataError(f"no real clip could be read: {len(beside.skipped)} skipped{reasons}")
    return beside


def _results(made: _Generated, beside: _Real, networks: _Networks) -> dict[str, Any]:
    sets = {"generated": made.judged, "real": beside.shown}
    if networks.vae is not None:
        sets["vae"] = beside.reconstructed
    return {
        "counts": {
            "generated": len(made.records),
            "real": len(beside.shown.judgements),
            "further_real": len(beside.others),
            "skipped": len(beside.skipped),
        },
        "accuracy": _accuracies(sets),
        "frechet": _frechet(made.judged, beside, networks.features),
        "given": _given(made.records, networks.given),
        "clips": made.records,
        "skipped": beside.skipped,
    }


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


def _given_psnr(clip: GeneratedClip, video: Tensor, networks: _Networks) -> dict[str, Any]:
    """PSNR of the frames that were given, together and each, in the generated video and in the VAE's reconstruction."""
    if clip.real is None:
        raise UsageError(f"{clip.key}: frames are said to be given, but not the clip that they are from")
    real, frames = _on(video.device, clip.real), list(networks.given)
    shown = {"given": video}
    if networks.vae is not None:
        shown["vae"] = reconstruct(networks.vae, real[None], networks.autocast)[0]
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


def _frechet(made: _Judged, beside: _Real, features: VideoFeatures) -> dict[str, Any]:
    """Generated to real, first; the name of the network's distance goes without the "r" of a reconstruction's."""
    shown, reference = beside.shown.features, beside.others
    if len(reference) < 2:
        reference = shown
        logger.warning("no real clips beyond those of the prompts: %s is the distance to these", features.name)
    record = frechet_record(_distance(reference, made.features, features), features)
    return {
        features.name.replace("rfvd", "fvd"): record.pop(features.name),
        "floor": None if reference is shown else _finite(_distance(reference, shown, features)),
        "vae": _finite(_distance(reference, beside.reconstructed.features, features)),
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
