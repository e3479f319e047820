"""The table at the end of a sweep."""

import csv
import json
import logging
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

log = logging.getLogger(__name__)


class CompareRuns(Callback):
    """Collects the `result.json` of a multirun's jobs into `comparison.csv` and prints them side by side."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Compare the runs in the sweep's folder, best first."""
        folder = Path(config.hydra.sweep.dir)
        results = [json.loads(path.read_text()) for path in sorted(folder.glob("*/result.json"))]
        if not results:
            log.warning("%s: no run of the sweep left a result", folder)
            return
        shared = set.intersection(*(set(result["overrides"]) for result in results))
        for result in results:
            result["run"] = " ".join(override for override in result["overrides"] if override not in shared)
        results.sort(key=lambda result: -(result["best_val_psnr"] or 0.0))
        columns = ["run", *sorted({key for result in results for key in result if key.startswith("val/")})]
        columns += ["best_val_psnr", "steps", "parameters", "seconds"]
        rows = [[_text(result.get(column)) for column in columns] for result in results]

        path = folder / "comparison.csv"
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([columns, *rows])
        table = Table(*columns, title=f"{len(rows)} runs in {folder}")
        for row in rows:
            table.add_row(*row)
        Console(stderr=True, width=None if Console(stderr=True).is_terminal else 140).print(table)
        print(path)


def _text(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value)
