"""Damage files in thousands of ways and read them: `python tools/fuzz.py --seed 7 --count 1000`.

Whatever is in a file, a reader gives what is in it, or ends with one line. This tool makes small valid files itself
(media, tars, listings, texts, configurations, weights), damages one at a time by a seed, and reads it as the verbs do,
in forked processes with limits to memory and time. It counts for each kind what was refused, read as before, read
differently, ended in a traceback, crashed the process or did not end.

`--only media --case 123` repeats one case and prints its traceback; files of faults are kept in `--keep`.
`--flips 200` flips so many single bits in shards, listings, features and weights: each must be found, or change
nothing of what is read. Exits with 1 if there is a traceback, crash, hang, or a flip that nothing finds.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf

from osp.audit.fuzz.cases import FAULTS, KINDS, Originals, Outcome
from osp.audit.fuzz.flips import TARGETS, Flips
from osp.audit.fuzz.media import mp4, still
from osp.audit.fuzz.report import Tally
from osp.audit.fuzz.subject import Reading, Subject, Unsafe
from osp.audit.fuzz.texts import make_run, make_samples
from osp.audit.fuzz.workers import Bounds, run_all
from osp.cli import main as osp
from osp.cli.page import run as write_page
from osp.cli.user_errors import user_error
from osp.errors import DataError

_RATE = {"rate": 0.5, "low": 0.4, "high": 0.6}
_GENERATION: dict[str, Any] = {
    "model": "a model",
    "settings": {"checkpoint": "last.ckpt", "guidance": 2.0, "solver": {"name": "euler", "steps": 4}, "mode": "text"},
    "accuracy": {"generated": {"all": _RATE, "colour": _RATE}, "chance": {"all": 0.002, "colour": 0.1}},
    "frechet": {"frechet_random3d": 1.5, "floor": 0.5},
    "given": None,
    "counts": {"generated": 1},
    "clips": [{"prompt": "a dog", "file": "0.mp4", "read": {"colour": "red"}, "right": {"all": True}}],
}
_RECONSTRUCTION: dict[str, Any] = {
    "counts": {"clips": 1},
    "mean": {"psnr": 24.4, "lpips": None},
    "psnr_gain": {"lowest_band": 3.5},
    "clips": [{"key": "clip0", "caption": "a dog"}],
}
_CHOICE = {
    "defaults": [{"override /data": "synthetic"}, {"override /module": "vae"}],
    "name": "mine",
    "module": {"lr": 1e-4, "accumulate": 1},
    "clip": {"frames": 9, "height": 32, "width": 32},
    "trainer": {"max_steps": 10},
}


class _Tags(HTMLParser):
    """Raises Unsafe at whatever could act in a page."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "script" or any(key.startswith("on") for key, _ in attrs):
            raise Unsafe(f"the page has an active <{tag}>")


def make_page_folders(folder: Path) -> None:
    """Write the folders of runs that a page shows."""
    for name in ("samples", "vae", "generation", "reconstruction/reconstructions"):
        (folder / name).mkdir(parents=True)
    make_samples(folder / "samples")
    make_run(folder / "vae")
    for name, metrics in (("generation", _GENERATION), ("reconstruction", _RECONSTRUCTION)):
        (folder / name / "metrics.json").write_text(json.dumps(metrics))
    (folder / "generation" / "0.mp4").write_bytes(mp4())
    (folder / "reconstruction" / "reconstructions" / "0.png").write_bytes(still("PNG16"))


def read_page(folder: Path, reading: Reading) -> None:
    """The page of these folders; nothing in it can act."""
    output = folder / "page.html"
    given = {"vae_run": "vae", "samples": "samples", "generation": "generation", "reconstruction": "reconstruction"}
    for name, part in given.items():
        empty: dict[str, Any] = dict.fromkeys([*given, "denoiser_run"])
        settings = {**empty, name: str(folder / part), "title": "fuzz", "clips": 4, "output": str(output)}
        output.unlink(missing_ok=True)
        reading(write_page, OmegaConf.create(settings))
        if output.exists():
            page = output.read_text(encoding="utf-8")
            reading.parts.append(page)
            _Tags().feed(page)


def make_choices(folder: Path) -> None:
    """A folder for `--config-dir` with an experiment of one's own."""
    (folder / "experiment").mkdir()
    text = "# @package _global_\n" + yaml.safe_dump(_CHOICE, sort_keys=False)
    (folder / "experiment" / "mine.yaml").write_text(text)


def read_choices(folder: Path, reading: Reading) -> None:
    """The experiment as the command line composes and checks it; nothing of it is built."""
    reading(_command, "train", "--config-dir", str(folder), "experiment=mine", "--cfg", "job", "--resolve")
    output = f"output={folder / 'output'}"
    reading(_command, "train", "--config-dir", str(folder), "experiment=mine", "trainer.max_steps=0", output)


def _command(*arguments: str) -> str:
    """The output of a command. Raises DataError with the line that it ends with, Unsafe if it ends in another way."""
    out, errors, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["osp", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            osp()
    except SystemExit as end:
        lines = errors.getvalue().splitlines()
        if end.code not in (1, 2) or sum(line.startswith("osp ") for line in lines) != 1:
            raise Unsafe(f"exit code {end.code} with {len(lines)} lines: {lines[-3:]}") from None
        raise DataError(lines[-1]) from None
    finally:
        sys.argv = before
    return out.getvalue()


SUBJECTS: dict[str, Sequence[Subject]] = {
    **KINDS,
    "texts": [
        *KINDS["texts"],
        Subject("page", make_page_folders, read_page, ["*/*.json", "*/*.jsonl"], weight=4),
    ],
    "configs": [*KINDS["configs"], Subject("choices", make_choices, read_choices, ["experiment/*.yaml"])],
}


def fuzz(given: argparse.Namespace, kind: str) -> bool:
    """Run the cases of a kind, tell what came of them; gives whether there was no fault."""
    tally = Tally(kind)
    with tempfile.TemporaryDirectory() as place:
        originals = Originals(Path(place), SUBJECTS[kind], partial(user_error, verb="train"))
        originals.make()

        def run(number: int) -> Outcome:
            return originals.run(f"{given.seed}/{kind}/{number}", given.keep / f"{kind}-{given.seed}-{number}")

        numbers = iter(range(given.count)) if given.case is None else iter([given.case])
        for number, outcome in run_all(run, numbers, given.bounds, Path(place) / "log"):
            if (reason := tally.add(outcome)) is not None:
                print(f"{kind} --seed {given.seed} --case {number}: {reason}", flush=True)
            if given.case is not None:
                print(f"{outcome.state} {outcome.what}\n{outcome.detail}")
    print(tally, *(f"  {count} x {reason}" for reason, count in tally.reasons.most_common()), sep="\n", flush=True)
    return not FAULTS & {*tally.states}


def flip(given: argparse.Namespace, target: str) -> bool:
    """Flip bits in a target, tell how many were found; gives whether none was silent."""
    tally, silent = Tally(f"flips: {target}"), FAULTS | {"different"}
    with tempfile.TemporaryDirectory() as place:
        flips = Flips(Path(place), target, partial(user_error, verb="train"))
        numbers = iter(range(given.flips)) if given.case is None else iter([given.case])
        for number, outcome in run_all(partial(flips.run, given.seed), numbers, given.bounds, Path(place) / "log"):
            if (reason := tally.add(outcome, silent)) is not None:
                print(f"{target!r} --seed {given.seed} --case {number}: {reason}", flush=True)
            if given.case is not None:
                print(f"{outcome.state} {outcome.what}\n{outcome.detail}")
    print(tally, flush=True)
    return not silent & {*tally.states}


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="other damage for each seed (0)")
    parser.add_argument("--only", nargs="+", default=None, help=f"kinds ({', '.join(SUBJECTS)}), or targets of flips")
    parser.add_argument("--count", type=int, default=200, help="cases of each kind (200)")
    parser.add_argument("--case", type=int, help="this case alone")
    parser.add_argument("--flips", type=int, help=f"flip so many bits in each of {', '.join(TARGETS)}")
    parser.add_argument("--keep", type=Path, default=Path("outputs/fuzz"), help="where files of faults go")
    parser.add_argument("--seconds", type=float, default=20.0, help="of computing that a case may take (20)")
    parser.add_argument("--memory", type=int, default=3072, help="mebibytes that a case may take (3072)")
    given = parser.parse_args(arguments)
    known = SUBJECTS if given.flips is None else TARGETS
    if unknown := {*(given.only or ())} - known.keys():
        parser.error(f"--only {', '.join(sorted(unknown))}: choose of {', '.join(known)}")
    given.bounds = Bounds(given.memory, given.seconds)
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; gives the exit code."""
    given = _arguments(arguments)
    torch.set_num_threads(1)  # a process that is forked has no threads
    one, known = (fuzz, SUBJECTS) if given.flips is None else (flip, TARGETS)
    outcomes: Iterator[bool] = (one(given, name) for name in known if given.only is None or name in given.only)
    return int(not all([*outcomes]))


if __name__ == "__main__":
    sys.exit(main())
