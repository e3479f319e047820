"""`osp bench`: how fast a part runs, what share of the device's best rate that is, and how much memory it takes."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from osp.cli.bench_case import Case, Target, measure, measure_apart
from osp.cli.bench_denoiser import DENOISER
from osp.cli.bench_report import draw, markdown, table_rows, write
from osp.cli.bench_vae import VAE
from osp.cli.checks import check_numbers
from osp.devices import PeakMemory, choose_device, describe_device, matmul_peak
from osp.errors import UsageError

log = logging.getLogger(__name__)

TARGETS: dict[str, Target] = {"vae": VAE, "denoiser": DENOISER}  # conf/bench/target has the settings of each


def run(cfg: DictConfig) -> dict[str, Any]:
    """Measure as configured and print the table; gives where it lies.

    Files in the output folder, each replaced as a whole, the first three after every row:
        table.md: what is printed.
        results.json: the same as numbers, with all runs of a row.
        results.csv: the rows.
        plot.png: speed and memory over length.

    Raises UsageError, before anything is measured, for settings that make no sense.
    """
    check_numbers(cfg, {"repeats": 1, "threads": 1}, optional=["threads"])
    if cfg.isolate not in (None, True, False):
        raise UsageError(f"isolate={cfg.isolate} makes no sense; choose true, false or null")
    if cfg.target not in TARGETS:
        raise UsageError(f"target={cfg.target} is none of `osp bench`; choose {', '.join(TARGETS)}")
    device, target = choose_device(cfg.device), TARGETS[cfg.target]
    cases, model = target.cases(cfg)
    threads = torch.get_num_threads() if cfg.threads is None else cfg.threads
    torch.set_num_threads(threads)
    isolate = device.type == "cpu" if cfg.isolate is None else cfg.isolate
    about: dict[str, Any] = {
        "target": cfg.target,
        "model": model,
        "device": describe_device(device),
        "torch": torch.__version__,
        "threads": threads,
        "repeats": cfg.repeats,
        "isolate": isolate,
        "memory": PeakMemory(device).how,
        "notes": list(target.notes),
        "columns": list(cases[0].about),
    }
    rates = _peaks(cases, device)
    output = Path(HydraConfig.get().runtime.output_dir)
    done: list[tuple[Case, dict[str, Any]]] = []
    for case in cases:
        run_case = measure_apart if isolate else measure
        done.append((case, {"note": case.note} if case.note else run_case(case, str(device), cfg.repeats, threads)))
        results = about | {"matmul_flops": rates, "rows": table_rows(done, rates)}
        write(output, results)
        row, what = results["rows"][-1], " ".join(str(value) for value in case.about.values() if value)
        log.info("%d of %d: %s: %s", len(done), len(cases), what, row["note"] or f"{row['seconds']:.3g} s")
    # Other programs may have slowed the first measurement of the rates.
    rates = {precision: max(rate, rates[precision]) for precision, rate in _peaks(cases, device).items()}
    results = about | {"matmul_flops": rates, "rows": table_rows(done, rates)}
    write(output, results)
    draw(output, results, target)
    print(markdown(results))
    return {
        "output": str(output),
        **{key: results[key] for key in ("target", "model", "device", "matmul_flops")},
        "rows": len(cases),
        "not_measured": sum(bool(row["note"]) for row in results["rows"]),
    }


def _peaks(cases: Sequence[Case], device: torch.device) -> dict[str, float]:
    """The rate to compare with for each precision, FLOP/s."""
    rates = {dtype: matmul_peak(device, dtype) for dtype in {case.dtype for case in cases}}
    return {case.precision: rates[case.dtype] for case in cases}
