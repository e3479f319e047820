"""`osp page`: what runs left in their folders, on one HTML page that can be sent as it is."""

import json
import logging
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from hydra.utils import to_absolute_path
from omegaconf import DictConfig

from osp.cli.checks import check_numbers
from osp.cli.curves import read_curves
from osp.cli.page_parts import Shown, charts, clips, section, table, tiles
from osp.cli.runs import RESULT
from osp.errors import DataError, UsageError
from osp.evaluation.output import METRICS
from osp.evaluation.prompt_accuracy import PARTS
from osp.evaluation.reconstruction import PAIRS
from osp.files import write_whole
from osp.sampling.outputs import SAMPLES, SampleFolder

log = logging.getLogger(__name__)

_LARGE = 20_000_000  # bytes; mail servers refuse more
_FOLDERS = ("vae_run", "reconstruction", "denoiser_run", "generation", "samples")
_CURVES = ("val/psnr", "val/loss", "train/loss", "train/total", "train/pixel", "train/gradient_norm")
_SETS = {
    "generated": "generated videos",
    "vae": "real clips as the VAE reconstructs them",
    "real": "real clips",
    "generated_shuffled": "generated videos, with other videos' prompts",
    "chance": "chance",
}


def run(cfg: DictConfig) -> dict[str, Any]:
    """Write the page; gives where it lies.

    Raises UsageError if no folder is given, DataError for one without the results that it should hold.
    """
    check_numbers(cfg, {"clips": 0})
    folders = {name: _paths(cfg[name]) for name in _FOLDERS}
    if not any(folders.values()):
        raise UsageError(
            f"there is nothing to show; give at least one of {', '.join(f'{name}=DIR' for name in _FOLDERS)}"
        )
    results = {
        name: [(path, _read(path, RESULT if name.endswith("_run") else METRICS)) for path in folders[name]]
        for name in _FOLDERS
        if name != "samples"
    }
    body = [tiles(_tiles(results))]
    for folder, metrics in results["generation"]:
        body += [_accuracy(metrics), _generated(folder, metrics, cfg.clips)]
    body += [_sampled(folder, cfg.clips) for folder in folders["samples"]]
    body += [_pairs(folder, metrics, cfg.clips) for folder, metrics in results["reconstruction"]]
    for name, called in (("denoiser_run", "denoiser"), ("vae_run", "VAE")):
        body += [_training(folder, result, called) for folder, result in results[name]]
    template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    page = template.substitute(title=escape(str(cfg.title)), body="\n".join(part for part in body if part))
    output = Path(to_absolute_path(cfg.output))
    output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(output, page)
    if len(page) > _LARGE:
        log.warning("%s is %.0f MB; show fewer clips=%d of each folder to mail it", output, len(page) / 1e6, cfg.clips)
    return {"output": str(output), "bytes": output.stat().st_size}


def _paths(given: Any) -> list[Path]:
    listed = [] if given is None else [given] if isinstance(given, str) else list(given)
    return [Path(to_absolute_path(str(path))) for path in listed]


def _read(folder: Path, name: str) -> dict[str, Any]:
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{folder / name}: {error.strerror}; give the folder of a run that has ended") from error
    except ValueError as error:
        raise DataError(f"{folder / name}: is no JSON ({error})") from error


def _tiles(results: Mapping[str, Sequence[tuple[Path, Mapping[str, Any]]]]) -> list[tuple[str, str, str]]:
    shown = []
    for _, metrics in results["generation"]:
        rates, frechet = metrics["accuracy"], metrics["frechet"]
        whole, name = rates["generated"]["all"], next(iter(frechet))
        mode = _mode(metrics)
        about = f"{_percent(whole['low'])} to {_percent(whole['high'])}; chance {_percent(rates['chance']['all'])}"
        shown.append((f"Videos that show their prompt{mode}", _percent(whole["rate"]), about))
        if metrics["given"] is None:
            floor = frechet["floor"]
            remark = "to real clips" if floor is None else f"to real clips; among real clips {floor:.3g}"
            shown.append((name, "none" if frechet[name] is None else f"{frechet[name]:.3g}", remark))
        else:
            loss = metrics["given"].get("loss")
            remark = "" if loss is None else f"{loss:.2f} dB below the VAE's own reconstruction"
            shown.append((f"PSNR of given frames{mode}", f"{metrics['given']['psnr']:.2f} dB", remark))
    for _, metrics in results["reconstruction"]:
        gains = [f"{gain:+.2f} dB over {name.replace('_', ' ')}" for name, gain in metrics["psnr_gain"].items()]
        shown.append(("PSNR of the VAE", f"{metrics['mean']['psnr']:.2f} dB", ", ".join(gains)))
    return shown


def _mode(metrics: Mapping[str, Any]) -> str:
    mode = metrics["settings"].get("mode", "text")
    return "" if mode == "text" else f" ({mode})"


def _accuracy(metrics: Mapping[str, Any]) -> str:
    """A row for each set of videos, a column for each part."""
    rows = [
        [called, *(_cell(metrics["accuracy"][name][part]) for part in ("all", *PARTS))]
        for name, called in _SETS.items()
        if name in metrics["accuracy"]
    ]
    counts = metrics["counts"]
    text = (
        f"{counts['generated']} videos of the prompts of held-out clips. A program that knows how such clips are "
        "drawn, and has learned nothing, reads colour, shape and motion from the pixels. In brackets the 95 % interval."
    )
    return section(f"Prompts{_mode(metrics)}", text, table(["", "all three", *PARTS], rows))


def _cell(rate: Any) -> str:
    if isinstance(rate, Mapping):
        return f"{_percent(rate['rate'])}\n({_percent(rate['low'])} to {_percent(rate['high'])})"
    return "" if rate is None else _percent(rate)


def _generated(folder: Path, metrics: Mapping[str, Any], most: int) -> str:
    shown = []
    for clip in [clip for clip in metrics["clips"] if "file" in clip][:most]:
        right = clip["right"]["all"]
        read = " ".join(word or "?" for word in clip["read"].values())
        mark = '<span class="right">&#10003;' if right else '<span class="wrong">&#10007;'
        shown.append(
            Shown(folder / clip["file"], f"<strong>{escape(clip['prompt'])}</strong><br>{mark} {escape(read)}</span>")
        )
    text = "Below each prompt, what was read from the video."
    return section(f"Generated{_mode(metrics)}", text, clips(shown), _about(metrics)) if shown else ""


def _about(metrics: Mapping[str, Any]) -> str:
    """How the videos were made."""
    settings = metrics["settings"]
    solver = settings.get("solver") or {}
    about = {
        "model": metrics["model"],
        "checkpoint": settings.get("checkpoint"),
        "prompts from": settings.get("input"),
        "solver": " ".join(f"{key}={value}" for key, value in solver.items() if value not in (None, {})) or None,
        "guidance": settings.get("guidance"),
        "seed": settings.get("seed"),
        "precision": settings.get("precision"),
        "device": settings.get("device"),
    }
    return table([], [[key, str(value)] for key, value in about.items() if value is not None])


def _sampled(folder: Path, most: int) -> str:
    listed = SampleFolder(folder, "mp4").listed
    if not listed:
        raise DataError(f"{folder / SAMPLES}: lists no video; give samples=DIR that `osp sample` wrote")
    shown = [
        Shown(
            folder / name,
            f"<strong>{escape(str(settings['prompt']))}</strong><br>seed {settings.get('seed')}",
            float(settings.get("fps") or 8.0),
        )
        for name, settings in list(listed.items())[:most]
    ]
    return section("Samples", f"Videos of other prompts ({folder.name}).", clips(shown))


def _pairs(folder: Path, metrics: Mapping[str, Any], most: int) -> str:
    named = sorted((folder / PAIRS).glob("*.*"))[:most]
    shown = [
        Shown(path, escape(clip["caption"] or clip["key"])) for path, clip in zip(named, metrics["clips"], strict=False)
    ]
    means = [[name, f"{value:.4g}"] for name, value in metrics["mean"].items() if value is not None]
    text = f"{metrics['counts']['clips']} held-out clips: on the left the clip, on the right what the VAE keeps of it."
    return section("Reconstruction", text, clips(shown, wide=True), table(["", "mean"], means))


def _training(folder: Path, result: Mapping[str, Any], called: str) -> str:
    logged = read_curves(folder)
    curves = {name: logged[name] for name in _CURVES if len(logged.get(name, [])) > 1}
    took = result["seconds"]
    about = f"{result['name']}: {result['steps']} steps of {result['parameters']:,} parameters"
    return section(
        f"Training of the {called}",
        f"{about}, {took / 60:.0f} minutes." if took >= 60 else f"{about}, {took:.0f} seconds.",
        charts(curves),
    )


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f} %"
