"""Does sparse attention match dense attention here? One study in small, all variants on the same cached features:

    python tools/study.py features=DIR heldout_features=DIR heldout=SHARDS output=DIR [--seeds 3] [--steps N] [--jobs 4]

Each variant is trained with each seed by `osp train experiment=t2v_tiny`, for the same number of steps, and judged by
`osp eval target=generation` on held-out prompts. Runs are processes of their own, in output/VARIANT/SEED; what is
finished is kept, and the same command goes on with the rest. When all are there, a training step of each variant is
timed, and output holds table.md, results.csv, results.json and plot.png.

All variants are joint blocks, of one width and number; cross-attention learns its prompts too slowly for so few steps.
Sparse ones begin and end with a dense block; 2+1D is the schedule of v1.0 and v1.1, without. `suv` is the sparse U with
long skips, and `dense_u` the same model with dense attention, which it is compared with.
"""

import argparse
import csv
import io
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from osp.cli import config_folder
from osp.cli.train import RESULT, other_setting
from osp.data.sources import FeatureClips
from osp.denoiser import Denoiser, Grid, Stage
from osp.denoiser.flops import denoiser_flops
from osp.denoiser.patterns import Dense, average_attention_distance
from osp.devices import autocast_dtype, choose_device, choose_precision, describe_device, synchronize
from osp.errors import DataError, OspError, UsageError
from osp.evaluation.output import METRICS
from osp.files import write_whole
from osp.training.checkpoints import LAST

EXPERIMENT = "t2v_tiny"
DENOISER = "joint_tiny"
BLOCKS = 6
FOLDERS = ("features", "heldout_features", "heldout", "output")
NAMES = ("2+1d", "dense", "skip_window_k2", "skiparse_k2", "skiparse_k4", "suv", "dense_u")
MOST_FILLING = 1.25  # places to tokens: beyond that a pattern is not what its name says

# Columns of the table: key, heading
COLUMNS = {
    "variant": "variant",
    "parameters": "parameters",
    "attention_distance": "attention distance",
    "val_loss": "val/loss",
    "val_loss_change": "to dense",
    "accuracy": "prompt accuracy, %",
    "accuracy_change": "to dense, points",
    "step_seconds": "s/step",
    "time_ratio": "time to dense",
    "flops_ratio": "FLOPs to dense",
}


@dataclass(frozen=True)
class Variant:
    """What is trained: the denoiser with other stages, and the variant that its costs are divided by."""

    name: str
    reference: str
    stages: tuple[Stage, ...]
    long_skips: bool

    @property
    def overrides(self) -> list[str]:
        """Of the command line of `osp train`."""
        stages = ",".join(
            "{" + ",".join(f"{key}:{value!r}" for key, value in asdict(stage).items()) + "}" for stage in self.stages
        )
        skips = str(self.long_skips).lower()
        return [f"denoiser={DENOISER}", f"denoiser.stages=[{stages}]", f"denoiser.long_skips={skips}"]


@dataclass(frozen=True)
class Run:
    """One variant with one seed, in a folder of its own."""

    variant: str
    seed: int
    folder: Path
    overrides: tuple[str, ...]
    steps: int
    evaluation: tuple[str, ...]  # overrides of `osp eval`, without those that name the run's folders

    @property
    def name(self) -> str:
        """As messages say it."""
        return f"{self.variant}, seed {self.seed}"

    def trained(self) -> bool:
        """Whether it has come to its last step."""
        path = self.folder / RESULT
        return path.exists() and bool(_read(path)["steps"] == self.steps)

    def check(self) -> None:
        """Raise UsageError if its folder holds a run of other settings, or one meant for other steps.

        The learning rate may fall towards the last step, so that a run which goes on further is another.
        """
        if not (path := self.folder / "config.yaml").exists():
            return
        before = OmegaConf.load(path)
        other = other_setting(before, composed(self.overrides))
        if other is None and before.trainer.max_steps != self.steps:
            other = f"trainer.max_steps={before.trainer.max_steps}, not {self.steps}"
        if other is not None:
            raise UsageError(f"{self.folder} holds a run with {other}; delete it, or choose another output=DIR")

    def evaluated(self) -> bool:
        """Whether its last state has been judged, by the same prompts."""
        path, trained = self.folder / "eval" / METRICS, self.folder / RESULT
        if not path.exists() or path.stat().st_mtime < trained.stat().st_mtime:
            return False
        settings = _read(path)["settings"]
        return f"prompts={settings['prompts']}" in self.evaluation and f"input='{settings['input']}'" in self.evaluation

    def commands(self) -> list[list[str]]:
        """What is still to be done."""
        checkpoint = self.folder / "checkpoints" / LAST
        judged = [f"checkpoint='{checkpoint}'", f"output='{self.folder / 'eval'}'", *self.evaluation]
        train = [] if self.trained() else [["train", *self.overrides]]
        return train if not train and self.evaluated() else [*train, ["eval", "target=generation", *judged]]


def main() -> None:
    """Train and judge what is missing, time, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="KEY=FOLDER", help=", ".join(FOLDERS))
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    parser.add_argument("--steps", type=int, help=f"of each run; default: those of {EXPERIMENT}")
    parser.add_argument("--jobs", type=int, default=4, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run, and of the timing")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=30, help="timed steps of each variant")
    parser.add_argument("--variants", default=",".join(NAMES), help="separated by commas; default: %(default)s")
    args = parser.parse_intermixed_args()
    given = dict(folder.partition("=")[::2] for folder in args.folders)
    if set(given) != set(FOLDERS) or not all(given.values()):
        parser.error("give features=DIR heldout_features=DIR heldout=SHARDS output=DIR")
    if unknown := set(args.variants.split(",")) - set(NAMES):
        parser.error(f"--variants: {', '.join(sorted(unknown))} is not known; choose from {', '.join(NAMES)}")
    for name in ("seeds", "steps", "jobs", "threads", "prompts", "rounds"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name} {value} makes no sense; it must be at least 1")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        study(args, {name: Path(folder).resolve() for name, folder in given.items()})
    except OspError as error:
        parser.exit(error.exit_code, f"study: {error}\n")


def study(args: argparse.Namespace, folders: Mapping[str, Path]) -> None:
    """See `main`. Raises UsageError or DataError for what the user can mend, before any work where that is known."""
    output, chosen = folders["output"], args.variants.split(",")
    base = composed([f"experiment={EXPERIMENT}", f"denoiser={DENOISER}"])
    steps = args.steps or base.trainer.max_steps
    known = variants(BLOCKS)
    device = choose_device("auto")
    precision = choose_precision(base.trainer.precision, device)
    source = FeatureClips(folders["features"], base.data.train.patch_size)
    torch.manual_seed(0)
    # References are timed even where they are not trained.
    timed = [name for name in NAMES if name in chosen or name in {known[one].reference for one in chosen}]
    models = {name: instantiate(composed(train_overrides(known[name], folders)).denoiser) for name in timed}
    inputs = random_batch(source, base)
    grid = grid_of(models, inputs)
    check_filling(models, grid)

    same = [f"data.val.path='{folders['heldout_features']}'", "data.workers=0", "logged_clips=0"]
    same += [f"trainer.max_steps={steps}", f"trainer.val_check_interval={steps}"]  # validated once, at the end
    evaluation = [f"input='{folders['heldout']}'", f"prompts={args.prompts}", f"precision={precision}"]
    evaluation += ["contact_sheet_clips=0", "save_videos=1"]
    runs = []
    for seed in range(args.seeds):
        for name in chosen:
            folder = output / name / str(seed)
            overrides = [*train_overrides(known[name], folders), *same, f"seed={seed}", f"output='{folder}'"]
            runs.append(Run(name, seed, folder, tuple(overrides), steps, tuple(evaluation)))
    for run in runs:
        run.check()
    run_all([run for run in runs if run.commands()], args.jobs, args.threads)

    torch.set_num_threads(args.threads)
    load = os.getloadavg()[0]
    seconds = time_steps(models, inputs, device, autocast_dtype(precision), args.rounds)
    outcomes = collect({name: [run.folder for run in runs if run.variant == name] for name in chosen})
    rows = make_rows([known[name] for name in chosen], outcomes, costs(models, inputs, seconds))
    own: dict[str, list[str]] = {known[name].reference: [] for name in chosen}
    for name in chosen:
        own[known[name].reference].append(name)
    references = "; ".join(f"{reference} for {', '.join(names)}" for reference, names in own.items())
    notes = [
        f"{EXPERIMENT}: {steps} steps of batch {base.data.batch_size}, seeds 0 to {args.seeds - 1}; mean ± standard "
        f"deviation over the seeds. val/loss is that of the averaged weights after the last step; prompt accuracy is "
        f"colour, shape and motion right at once, of {outcomes[chosen[0]][0]['prompts']} held-out prompts. "
        "Changes to dense are from the dense run with the same seed, which draws the same noise in validation: "
        "val/loss itself varies with that draw.",
        f"A step is the denoiser's forward and backward pass, without text encoder and optimiser: latents "
        f"{shape_of(inputs['latent'])}, {grid.tokens} tokens ({'x'.join(map(str, grid))}), text "
        f"{shape_of(inputs['text'])}, "
        f"{precision}; median of {args.rounds} rounds through all variants; "
        f"{describe_device(device)}; torch {torch.__version__}; load average before: {load:.2f}.",
        "Parameters are the denoiser's. Attention distance is the average number of attentions from a token to another "
        "by the sparse blocks alone, ways through the text not counted. FLOPs are counted, of a step. Time and FLOPs "
        f"are divided by those of the dense model of the same kind: {references}.",
    ]
    results = {"rows": rows, "notes": notes, "steps": steps, "batch": base.data.batch_size, "seeds": args.seeds}
    results |= {"device": describe_device(device), "precision": precision, "latent": list(inputs["latent"].shape)}
    results |= {"threads": args.threads, "rounds": args.rounds, "torch": torch.__version__}
    write(output, results)
    print(markdown(results))
    files = {name: str(output / name) for name in ("table.md", "results.csv", "results.json", "plot.png")}
    print(json.dumps({"output": str(output), "files": files, "rows": rows}), flush=True)


def variants(blocks: int) -> dict[str, Variant]:
    """All that there are, of so many blocks each. Raises UsageError for too few to make a sparse U of them."""
    if blocks < 5:
        raise UsageError(f"{blocks} blocks make no sparse U; it needs 5 at least")
    dense, side = Stage(1), (blocks - 2) // 3
    inner = blocks - 2 - 2 * side
    u = (dense, Stage(side, "skiparse", 2), Stage(inner, "skiparse", 4), Stage(side, "skiparse", 2), dense)
    straight = {
        "2+1d": (Stage(blocks, "2+1d"),),
        "dense": (Stage(blocks),),
        "skip_window_k2": (dense, Stage(blocks - 2, "skip_window", 2), dense),
        "skiparse_k2": (dense, Stage(blocks - 2, "skiparse", 2), dense),
        "skiparse_k4": (dense, Stage(blocks - 2, "skiparse", 4), dense),
    }
    # Stages of the dense one are as many, so that it has the same long skips.
    skipping = {"suv": u, "dense_u": tuple(Stage(stage.blocks) for stage in u)}
    made = {name: Variant(name, "dense", stages, long_skips=False) for name, stages in straight.items()}
    return made | {name: Variant(name, "dense_u", stages, long_skips=True) for name, stages in skipping.items()}


def composed(overrides: Sequence[str]) -> DictConfig:
    """The configuration of `osp train` with these overrides."""
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return compose("train", list(overrides))


def train_overrides(variant: Variant, folders: Mapping[str, Path]) -> list[str]:
    """What makes the variant."""
    return [f"experiment={EXPERIMENT}", *variant.overrides, f"data.train.path='{folders['features']}'"]


def random_batch(source: FeatureClips, cfg: DictConfig) -> dict[str, Tensor]:
    """Inputs of a training step as long as those of the first clips: random latents and times, their captions' text."""
    clips = [source.read(index % len(source), 0) for index in range(cfg.data.batch_size)]
    with torch.no_grad():
        text = instantiate(cfg.text)([clip["caption"] for clip in clips])
    return {
        "latent": torch.randn(len(clips), *clips[0]["latent"].shape),
        "time": torch.rand(len(clips)) * 1000,
        "text": text.text,
        "text_mask": text.mask,
        "pooled_text": text.pooled,
    }


def grid_of(models: Mapping[str, Denoiser], inputs: Mapping[str, Tensor]) -> Grid:
    """That of the tokens, which all variants have in common."""
    frames, height, width = inputs["latent"].shape[2:]
    patch = next(iter(models.values())).patch_size
    return Grid(frames, height // patch, width // patch)


def check_filling(models: Mapping[str, Denoiser], grid: Grid) -> None:
    """Raise UsageError for a pattern whose groups are to a large part filled up on this grid."""
    for name, model in models.items():
        for pattern in dict.fromkeys(model.schedule):
            places = math.prod(pattern.split(grid).padded)
            if places > MOST_FILLING * grid.tokens:
                raise UsageError(
                    f"{name}: {pattern} needs {places} places for {grid.tokens} tokens; leave the variant out, or take "
                    "larger clips"
                )


def run_all(runs: Sequence[Run], jobs: int, threads: int) -> None:
    """Do what the runs lack, `jobs` at a time. Raises DataError at the end if some have failed."""
    children: set[subprocess.Popen[bytes]] = set()

    def finish(run: Run) -> str | None:
        begun = time.monotonic()
        run.folder.mkdir(parents=True, exist_ok=True)
        log = run.folder / "study.log"
        for command in run.commands():
            with open(log, "ab") as said:
                child = subprocess.Popen(
                    [sys.executable, "-m", "osp.cli", *command],
                    stdout=said,
                    stderr=subprocess.STDOUT,
                    env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                )
                children.add(child)
                code = child.wait()
                children.remove(child)
            if code or not run.trained():  # a training that is told to stop ends well, but early
                last = log.read_text(errors="replace").strip().splitlines()[-1:]
                return f"{run.name}: osp {command[0]} ended with exit code {code} ({log}): {''.join(last)}"
        print(f"{run.name}: {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
        return None

    print(f"{len(runs)} runs to do", file=sys.stderr, flush=True)
    pool = ThreadPoolExecutor(jobs)
    try:
        failures = [failure for failure in pool.map(finish, runs) if failure is not None]
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in list(children):
            child.terminate()
        raise
    if failures:
        raise DataError("; ".join(failures))


def time_steps(
    models: Mapping[str, Denoiser],
    inputs: Mapping[str, Tensor],
    device: torch.device,
    dtype: torch.dtype | None,
    rounds: int,
) -> dict[str, list[float]]:
    """Seconds of a forward and backward pass of each model, in turns, so that what slows the machine slows all."""
    placed = {key: value.to(device) for key, value in inputs.items()}
    placed["text"].requires_grad_()  # the text encoder learns along
    for model in models.values():
        model.to(device).train()
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for number in range(rounds + 2):
        for name, model in models.items():
            synchronize(device)
            begun = time.perf_counter()
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                loss = model(**placed).float().square().mean()
            loss.backward()
            synchronize(device)
            if number >= 2:  # the first are slower
                seconds[name].append(time.perf_counter() - begun)
            model.zero_grad()
            placed["text"].grad = None
    return seconds


def costs(
    models: Mapping[str, Denoiser], inputs: Mapping[str, Tensor], seconds: Mapping[str, Sequence[float]]
) -> dict[str, dict[str, float]]:
    """What each model is and takes: `parameters`, `attention_distance`, `step_seconds` (median), `flops` (a step)."""
    grid, made = grid_of(models, inputs), {}
    batch, latent, text = len(inputs["latent"]), inputs["latent"].shape[2:], inputs["text"].shape[1]
    for name, model in models.items():
        flops = denoiser_flops(model, latent, text, batch)
        # One dense block would make every distance 1.
        sparse = [pattern for pattern in model.schedule if pattern != Dense()] or model.schedule
        made[name] = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "attention_distance": average_attention_distance(sparse, grid),
            "step_seconds": statistics.median(seconds[name]),
            "flops": flops.forward + flops.backward,
        }
    return made


def collect(folders: Mapping[str, Sequence[Path]]) -> dict[str, list[dict[str, Any]]]:
    """What the finished runs of each variant came to: `val_loss`, `accuracy` (all three right) and `prompts`.

    With them come the accuracies of `chance` and of the VAE's `reconstructions` of the prompts' real clips.

    Raises DataError for a run that has left no results.
    """
    outcomes: dict[str, list[dict[str, Any]]] = {}
    for name, own in folders.items():
        for folder in own:
            rates = _read(folder / "eval" / METRICS)["accuracy"]
            outcomes.setdefault(name, []).append(
                {
                    "val_loss": _read(folder / RESULT)["val/loss"],
                    "accuracy": rates["generated"]["all"]["rate"],
                    "prompts": rates["generated"]["all"]["count"],
                    "chance": rates["chance"]["all"],
                    "reconstructions": rates["vae"]["all"]["rate"],
                }
            )
    return outcomes


def make_rows(
    chosen: Sequence[Variant],
    outcomes: Mapping[str, Sequence[Mapping[str, Any]]],
    cost: Mapping[str, Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """A row for each variant: its costs, alone and by those of its reference, and mean and sd over its runs.

    Changes are those to the reference's run with the same seed. The standard deviation of one run is None, as are
    changes to what was not run, or is the reference itself.
    """
    rows = []
    for variant in chosen:
        own, reference = cost[variant.name], cost[variant.reference]
        row = {"variant": variant.name, "reference": variant.reference, **own}
        row["time_ratio"] = own["step_seconds"] / reference["step_seconds"]
        row["flops_ratio"] = own["flops"] / reference["flops"]
        runs = outcomes[variant.name]
        for key in ("val_loss", "accuracy"):
            row[key], row[f"{key}_sd"] = mean_and_sd([run[key] for run in runs])
            others = [] if variant.name == variant.reference else outcomes.get(variant.reference, [])
            pairs = zip(runs, others, strict=bool(others))
            row[f"{key}_change"], row[f"{key}_change_sd"] = mean_and_sd([run[key] - other[key] for run, other in pairs])
        bounds = {key: runs[0][key] for key in ("chance", "reconstructions")}
        rows.append(row | bounds | {"runs": list(runs)})
    return rows


def mean_and_sd(values: Sequence[float]) -> tuple[float | None, float | None]:
    """None where there are too few values."""
    return statistics.mean(values) if values else None, statistics.stdev(values) if len(values) > 1 else None


def markdown(results: Mapping[str, Any]) -> str:
    """The table, and how it was made below it."""
    cells = [[text_of(row, key) for key in COLUMNS] for row in results["rows"]]
    lines = [f"| {' | '.join(line)} |" for line in cells]
    return "\n".join([f"| {' | '.join(COLUMNS.values())} |", "|---|" + "---:|" * (len(COLUMNS) - 1), *lines, ""]) + (
        "\n" + "\n".join(f"- {note}" for note in results["notes"])
    )


def text_of(row: Mapping[str, Any], key: str) -> str:
    """A cell of the table."""
    value = row[key]
    if value is None:
        return "-"
    if f"{key}_sd" in row:
        factor, digits = (100, 1) if key.startswith("accuracy") else (1, 4)
        sign, spread = "+" if key.endswith("change") else "", row[f"{key}_sd"]
        return f"{factor * value:{sign}.{digits}f}" + ("" if spread is None else f" ± {factor * spread:.{digits}f}")
    if key == "step_seconds":
        return f"{value:.4f}"
    return str(value) if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:.2f}"


def write(output: Path, results: Mapping[str, Any]) -> None:
    """Write table.md, results.csv, results.json and plot.png."""
    write_whole(output / "table.md", markdown(results) + "\n")
    write_whole(output / "results.json", json.dumps(results, indent=1, allow_nan=False))
    columns = [key for key in results["rows"][0] if key != "runs"]
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    table.writeheader()
    table.writerows(results["rows"])
    write_whole(output / "results.csv", text.getvalue())
    image = io.BytesIO()
    draw(results["rows"]).savefig(image, format="png", dpi=120)
    write_whole(output / "plot.png", image.getvalue())


def draw(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy and validation loss over the relative time of a step, with standard deviations."""
    figure = Figure(figsize=(11, 5), layout="constrained")
    references = list(dict.fromkeys(row["reference"] for row in rows))
    for axes, (key, label, factor) in zip(
        figure.subplots(1, 2), (("accuracy", "prompt accuracy, %", 100), ("val_loss", "val/loss", 1)), strict=True
    ):
        for row in rows:
            spread, colour = row[f"{key}_sd"] or 0.0, f"C{references.index(row['reference'])}"
            x, y = row["time_ratio"], factor * row[key]
            axes.errorbar(x, y, yerr=factor * spread, fmt="o", color=colour, capsize=4)
            axes.annotate(row["variant"], (x, y), xytext=(6, 5), textcoords="offset points", fontsize="small")
        axes.set_xlabel("time of a training step, relative to dense attention")
        axes.set_ylabel(label)
        axes.margins(x=0.3, y=0.1)
        axes.grid(alpha=0.3)
        if key == "accuracy":
            for line, style in (("reconstructions", "--"), ("chance", ":")):
                axes.axhline(100 * rows[0][line], color="gray", linestyle=style, linewidth=1, label=line)
            axes.legend(fontsize="small")
    figure.suptitle("mean and standard deviation over the seeds", fontsize="medium")
    return figure


def shape_of(tensor: Tensor) -> str:
    """As text."""
    return "x".join(map(str, tensor.shape))


def _read(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); delete the run's folder, and the study makes it again"
        ) from error
    return values


if __name__ == "__main__":
    main()
