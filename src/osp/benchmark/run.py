"""Measure cases one after another, and write the table after each."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from osp.benchmark.case import Case, Target, measure, measure_apart
from osp.benchmark.results import plot, table_rows, write
from osp.devices import PeakMemory, describe_device, matmul_peak

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conditions:
    """The conditions that all cases are measured under.

    Args:
        threads: on the CPU; None: torch's choice.
        isolate: each case in a process of its own; None: on the CPU.
    """

    device: torch.device
    repeats: int
    threads: int | None = None
    isolate: bool | None = None

    def set_up(self) -> dict[str, Any]:
        """Give torch its threads; then what results say of the conditions, with what None stands for."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return {
            "device": describe_device(self.device),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "repeats": self.repeats,
            "isolate": self.device.type == "cpu" if self.isolate is None else self.isolate,
            "memory": PeakMemory(self.device).how,
        }


def run_benchmark(
    target: Target, about: Mapping[str, Any], cases: Sequence[Case], conditions: Conditions, output: Path
) -> dict[str, Any]:
    """The results of the cases: `about`, the conditions, the peak rates (`matmul_flops`) and `rows`.

    Files in `output`, each replaced as a whole, the first three after every row: `table.md`, `results.json` (the same
    as numbers, with all runs of a row), `results.csv` (the rows), and `plot.png` (speed and memory over length).
    """
    device, measured = conditions.device, conditions.set_up()
    results = {**about, **measured, "notes": list(target.notes), "columns": list(cases[0].about)}
    run_case = measure_apart if measured["isolate"] else measure
    rates = _peaks(cases, device)
    done: list[tuple[Case, dict[str, Any]]] = []
    for case in cases:
        how = (str(device), conditions.repeats, measured["threads"])
        done.append((case, {"note": case.note} if case.note else run_case(case, *how)))
        results |= {"matmul_flops": rates, "rows": table_rows(done, rates)}
        write(output, results)
        row, what = results["rows"][-1], " ".join(str(value) for value in case.about.values() if value)
        log.info("%d of %d: %s: %s", len(done), len(cases), what, row["note"] or f"{row['seconds']:.3g} s")
    # Other programs may have slowed the first measurement of the rates.
    rates = {precision: max(rate, rates[precision]) for precision, rate in _peaks(cases, device).items()}
    results |= {"matmul_flops": rates, "rows": table_rows(done, rates)}
    write(output, results)
    plot(output, results, target)
    return results


def _peaks(cases: Sequence[Case], device: torch.device) -> dict[str, float]:
    """The rate to compare with for each precision, FLOP/s."""
    rates = {dtype: matmul_peak(device, dtype) for dtype in {case.dtype for case in cases}}
    return {case.precision: rates[case.dtype] for case in cases}
