"""The results of the study's finished runs: one table of its variants, the same table as files, and one plot."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from osp.benchmark.study_runs import Variant
from osp.errors import DataError
from osp.evaluation.output import METRICS
from osp.files import write_whole
from osp.report.plots import write_figure
from osp.report.tables import csv_text, markdown_table
from osp.training.runs import TrainingRun

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILES = ("table.md", "results.csv", "results.json", "plot.png")

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


def collect(folders: Mapping[str, Sequence[Path]]) -> dict[str, list[dict[str, Any]]]:
    """The results of each variant's finished runs: `val_loss`, `accuracy` (all three right) and `prompts`.

    With them come the accuracies of `chance` and of the VAE's `reconstructions` of the prompts' real clips.

    Raises DataError for a run that has left no results.
    """
    outcomes: dict[str, list[dict[str, Any]]] = {}
    for name, own in folders.items():
        for folder in own:
            rates, result = _metrics(folder / "eval" / METRICS)["accuracy"], TrainingRun(folder).result()
            if result is None:
                raise DataError(f"{folder}: has no result; the study makes it again")
            outcomes.setdefault(name, []).append(
                {
                    "val_loss": result["val/loss"],
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
    lines = markdown_table(list(COLUMNS.values()), cells, left=1)
    return "\n".join([*lines, "", *(f"- {note}" for note in results["notes"])])


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
    write_whole(output / "results.csv", csv_text(columns, results["rows"]))
    write_figure(output / "plot.png", draw(results["rows"]))


def draw(rows: Sequence[Mapping[str, Any]]) -> "Figure":
    """Accuracy and validation loss over the relative time of a step, with standard deviations."""
    from matplotlib.figure import Figure  # takes its time to load

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


def _metrics(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); delete the run's folder, and the study makes it again"
        ) from error
    return values
