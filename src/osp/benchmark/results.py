"""The results of `osp bench`: one table, the same table as files, and one plot."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from osp.benchmark.case import Case, Target
from osp.files import write_whole
from osp.report.plots import Line, draw_panels, write_figure
from osp.report.tables import csv_text, markdown_table

# Columns of the table that are measured or counted: heading, and what its numbers are divided by
_MEASURED = {
    "seconds": ("seconds", 1),
    "frames_per_second": ("frames/s", 1),
    "megapixels_per_second": ("megapixels/s", 1),
    "tokens_per_second": ("tokens/s", 1),
    "flops": ("TFLOP", 1e12),
    "attention_distance": ("attention distance", 1),
    "share_of_peak": ("% of peak", 0.01),
    "peak_bytes": ("peak MiB", 1 << 20),
    "taken_bytes": ("taken MiB", 1 << 20),
    "time_ratio": ("time ratio", 1),
    "flops_ratio": ("FLOP ratio", 1),
    "memory_ratio": ("memory ratio", 1),
}


def table_rows(
    done: Iterable[tuple[Case, Mapping[str, Any]]], matmul_flops: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Cases, and what `measure` gave for each -> rows, with all that follows from it.

    `matmul_flops` is the peak rate to compare with, for each precision. What a row does not have is None.
    """
    done = list(done)
    references = {
        case.group: {"flops": case.flops, **measured}
        for case, measured in done
        if case.is_reference and "seconds" in measured
    }
    rows = [_row(case, measured, references.get(case.group), matmul_flops[case.precision]) for case, measured in done]
    if all(row.get("flops_ratio", 1) == 1 for row in rows):  # a target whose rows differ in how, not in what, they do
        for row in rows:
            row.pop("flops_ratio", None)
    return rows


def _row(
    case: Case, measured: Mapping[str, Any], reference: Mapping[str, Any] | None, matmul_flops: float
) -> dict[str, Any]:
    row = {**case.about, "flops": case.flops, **case.counted, "note": measured.get("note", "")}
    if "seconds" not in measured:
        return row
    seconds, taken = min(measured["seconds"]), measured["taken_bytes"]
    row |= {f"{name}_per_second": amount / seconds for name, amount in case.work.items()}
    row |= {"share_of_peak": case.flops / seconds / matmul_flops}
    row |= {"peak_bytes": measured["peak_bytes"], "taken_bytes": taken}
    if reference is not None:
        row["time_ratio"] = seconds / min(reference["seconds"])
        row["flops_ratio"] = case.flops / reference["flops"]
        row["memory_ratio"] = taken / reference["taken_bytes"] if taken and reference["taken_bytes"] else None
    return row | {"seconds": seconds, "all_seconds": measured["seconds"], "first_seconds": measured["first_seconds"]}


def write(output: Path, results: Mapping[str, Any]) -> None:
    """Write table.md, results.json and results.csv."""
    write_whole(output / "table.md", markdown(results) + "\n")
    write_whole(output / "results.json", json.dumps(results, indent=1, allow_nan=False))
    columns = [*results["columns"], *_measured(results["rows"]), "first_seconds", "note"]
    write_whole(output / "results.csv", csv_text(columns, results["rows"]))


def markdown(results: Mapping[str, Any]) -> str:
    """The table, with what all rows have in common above it and how to read it below."""
    rows = results["rows"]
    varied = [key for key in results["columns"] if len(rows) == 1 or _differs(rows, key)]
    fixed = [key for key in results["columns"] if key not in varied and rows[0][key] is not None]
    same = [f"{_heading(key)} {_text(rows[0], key)}" for key in fixed]
    columns = varied + _measured(rows)
    columns += ["note"] if any(row["note"] for row in rows) else []
    rates = [f"{rate / 1e12:.3g} TFLOP/s in {precision}" for precision, rate in results["matmul_flops"].items()]
    return "\n".join(
        [
            f"{results['model']}; {', '.join(same)}" if same else results["model"],
            "",
            f"{results['device']}; torch {results['torch']}; the peak, of matrix products: {', '.join(rates)}; "
            f"best of {results['repeats']} runs after one not counted; memory is {results['memory']}",
            "",
            *markdown_table(list(map(_heading, columns)), [[_text(row, key) for key in columns] for row in rows]),
            "",
            *(f"- {note}" for note in results["notes"]),
        ]
    )


def _measured(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns that some row has."""
    return [key for key in _MEASURED if any(row.get(key) is not None for row in rows)]


def plot(output: Path, results: Mapping[str, Any], target: Target) -> None:
    """Write plot.png, with speed above and memory taken below; where no row was measured there is no plot."""
    (output / "plot.png").unlink(missing_ok=True)
    rows = sorted((row for row in results["rows"] if "seconds" in row), key=lambda row: row[target.x])
    if not rows:
        return
    quantities = (target.speed, "taken_bytes")
    coloured = _coloured(rows, [key for key in results["columns"] if key not in (target.panel, *target.style)], target)
    lines: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        where = _label(row, [target.panel]), _label(row, coloured), _label(row, target.style)
        lines.setdefault(where, []).append(row)
    drawn = [
        Line(
            *where, [[(row[target.x], row[key] / _MEASURED[key][1]) for row in some if row[key]] for key in quantities]
        )
        for where, some in lines.items()
    ]
    title = f"{results['model']}\n{results['device']}"
    write_figure(output / "plot.png", draw_panels(drawn, _heading(target.x), list(map(_heading, quantities)), title))


def _coloured(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], target: Target) -> list[str]:
    """The columns that a line's colour stands for."""
    others = [key for key in columns if key != target.x]
    # A column that changes only with the length, such as another way to say the size, needs no colour.
    alike = [[row for row in rows if row[target.x] == length] for length in {row[target.x] for row in rows}]
    found = [key for key in others if any(_differs(some, key) for some in alike)]
    return found or [key for key in others[:1] if not _differs(rows, key)]


def _label(row: Mapping[str, Any], keys: Iterable[str]) -> str:
    """A row's values as a legend says them; what a row does not have, or is not, is left out."""
    return " ".join(_named(key, row[key]) for key in keys if row[key])


def _named(key: str, value: Any) -> str:
    if value is True:
        return _heading(key)
    return f"{value} {_heading(key)}" if isinstance(value, int) else str(value)


def _differs(rows: Sequence[Mapping[str, Any]], key: str) -> bool:
    return any(row[key] != rows[0][key] for row in rows)


def _heading(key: str) -> str:
    return _MEASURED[key][0] if key in _MEASURED else key.replace("_", " ")


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if key not in _MEASURED:
        return str(value)
    if key.endswith(("ratio", "distance")):
        return f"{value:.2f}"
    value /= _MEASURED[key][1]
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"
