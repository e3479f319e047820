"""One HTML page of what runs, evaluations and samples left, that can be sent as it is."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from string import Template
from typing import Any

from osp.checks import check_number
from osp.errors import DataError
from osp.report.html import Shown, charts, clips, section, table, tiles
from osp.report.markup import Html, joined, tag
from osp.report.records import inside

_CURVES = ("val/psnr", "val/loss", "train/loss", "train/total", "train/pixel", "train/gradient_norm")
_SETS = {
    "generated": "generated videos",
    "vae": "real clips as the VAE reconstructs them",
    "real": "real clips",
    "generated_shuffled": "generated videos, with other videos' prompts",
    "chance": "chance",
}
Metrics = Mapping[str, Any]


@dataclass(frozen=True)
class Content:
    """The contents of a page, in this order: values as the files hold them, and paths of videos.

    Args:
        generations: folders of `osp eval target=generation`, and their metrics.
        samples: folders of `osp sample`, and the settings of each file in them, by its name.
        reconstructions: videos of `osp eval`, clip and reconstruction side by side, and the metrics of their folder.
        trainings: what was trained ("VAE"), the run's result, and its curves of (step, value).
    """

    generations: Sequence[tuple[Path, Metrics]] = ()
    samples: Sequence[tuple[Path, Mapping[str, Metrics]]] = ()
    reconstructions: Sequence[tuple[Sequence[Path], Metrics]] = ()
    trainings: Sequence[tuple[str, Metrics, Mapping[str, Sequence[tuple[int, float]]]]] = ()


def html_page(title: str, content: Content, most: int) -> str:
    """The page, with `most` videos of each folder inside.

    Its content policy lets it show what lies in the page, in its own style, and nothing else: no scripts, no other
    files. Raises DataError for a video that cannot be read, or lies outside its folder.
    """
    body: list[Html | None] = [tiles(_tiles(content))]
    for folder, metrics in content.generations:
        body += [_accuracy(metrics), _generated(folder, metrics, most)]
    body += [_sampled(folder, listed, most) for folder, listed in content.samples]
    body += [_pairs(pairs, metrics, most) for pairs, metrics in content.reconstructions]
    body += [_training(*training) for training in content.trainings]
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    style = template.partition("<style>")[2].partition("</style>")[0]
    digest = base64.b64encode(sha256(style.encode()).digest()).decode()
    parts = joined(*(part for part in body if part), between="\n")
    return Template(template).substitute(title=joined(title), style=f"'sha256-{digest}'", body=parts)


def _tiles(content: Content) -> list[tuple[str, str, str]]:
    shown = []
    for _, metrics in content.generations:
        rates, frechet = metrics["accuracy"], metrics["frechet"]
        whole, name = rates["generated"]["all"], next(iter(frechet), "floor")
        mode = _mode(metrics)
        about = f"{_percent(whole['low'])} to {_percent(whole['high'])}; chance {_percent(rates['chance']['all'])}"
        shown.append((f"Videos that show their prompt{mode}", _percent(whole["rate"]), about))
        if metrics["given"] is None:
            floor, distance = frechet.get("floor"), frechet.get(name)
            remark = "to real clips" if floor is None else f"to real clips; among real clips {floor:.3g}"
            shown.append((name, "none" if distance is None else f"{distance:.3g}", remark))
        else:
            loss = metrics["given"].get("loss")
            remark = "" if loss is None else f"{loss:.2f} dB below the VAE's own reconstruction"
            shown.append((f"PSNR of given frames{mode}", f"{metrics['given']['psnr']:.2f} dB", remark))
    for _, metrics in content.reconstructions:
        gains = [f"{gain:+.2f} dB over {name.replace('_', ' ')}" for name, gain in metrics["psnr_gain"].items()]
        shown.append(("PSNR of the VAE", f"{metrics['mean']['psnr']:.2f} dB", ", ".join(gains)))
    return shown


def _mode(metrics: Metrics) -> str:
    mode = metrics["settings"].get("mode")
    return "" if mode in (None, "text") else f" ({mode})"


def _accuracy(metrics: Metrics) -> Html:
    """A row for each set of videos, a column for each part that is judged."""
    parts = [part for part in metrics["accuracy"]["chance"] if part != "all"]
    rows = [
        [called, *(_cell(metrics["accuracy"][name].get(part)) for part in ("all", *parts))]
        for name, called in _SETS.items()
        if name in metrics["accuracy"]
    ]
    counts = metrics["counts"]
    text = (
        f"{counts['generated']} videos of the prompts of held-out clips. A program that knows how such clips are "
        "drawn, and has learned nothing, reads colour, shape and motion from the pixels. In brackets the 95 % interval."
    )
    return section(f"Prompts{_mode(metrics)}", text, table(["", "all three", *parts], rows))


def _cell(rate: Any) -> str:
    if isinstance(rate, Mapping):
        return f"{_percent(rate['rate'])}\n({_percent(rate['low'])} to {_percent(rate['high'])})"
    return "" if rate is None else _percent(rate)


def _generated(folder: Path, metrics: Metrics, most: int) -> Html | None:
    shown = []
    for clip in [clip for clip in metrics["clips"] if "file" in clip][:most]:
        right = clip["right"]["all"]
        read = " ".join(word or "?" for word in clip["read"].values())
        verdict = tag("span", "✓ " if right else "✗ ", read, class_="right" if right else "wrong")
        shown.append(Shown(inside(folder, clip["file"]), _caption(clip["prompt"], verdict)))
    text = "Below each prompt, what was read from the video."
    return section(f"Generated{_mode(metrics)}", text, clips(shown), _about(metrics)) if shown else None


def _caption(prompt: str, below: object) -> Html:
    return joined(tag("strong", prompt), tag("br"), below)


def _about(metrics: Metrics) -> Html:
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


def _sampled(folder: Path, listed: Mapping[str, Metrics], most: int) -> Html:
    shown = []
    for name, settings in list(listed.items())[:most]:
        fps = 8.0 if settings.get("fps") is None else float(settings["fps"])
        check_number(f"{folder / name}: fps", fps, 0.01, 1000.0, error=DataError)
        shown.append(Shown(inside(folder, name), _caption(settings["prompt"], f"seed {settings.get('seed')}"), fps))
    return section("Samples", f"Videos of other prompts ({folder.name}).", clips(shown))


def _pairs(pairs: Sequence[Path], metrics: Metrics, most: int) -> Html:
    shown = [
        Shown(inside(path.parent.parent, f"{path.parent.name}/{path.name}"), clip.get("caption") or clip["key"])
        for path, clip in zip(pairs[:most], metrics["clips"], strict=False)
    ]
    means = [[name, f"{value:.4g}"] for name, value in metrics["mean"].items() if value is not None]
    text = f"{metrics['counts']['clips']} held-out clips: on the left the clip, on the right what the VAE keeps of it."
    return section("Reconstruction", text, clips(shown, wide=True), table(["", "mean"], means))


def _training(called: str, result: Metrics, logged: Mapping[str, Sequence[tuple[int, float]]]) -> Html:
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
