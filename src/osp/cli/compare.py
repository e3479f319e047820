"""The table at the end of a sweep."""

import json
import logging
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from osp.files import write_whole
from osp.report.tables import as_texts, csv_text, print_table
from osp.training.runs import TrainingRun, is_first_process

log = logging.getLogger(__name__)


class CompareRuns(Callback):
    """Collects what a multirun's jobs left into `comparison.csv`, after each job, and prints it at the end."""

    def __init__(self) -> None:
        self._results: list[dict[str, Any]] = []

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Take in one more run, if it has a result."""
        if config.hydra.mode.name != "MULTIRUN" or not is_first_process():
            return
        result = TrainingRun(Path(HydraConfig.get().runtime.output_dir)).result()
        if result is not None:
            self._results.append(result)
            write_whole(self._path(config), csv_text(*self._table()))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the runs, best first."""
        if not is_first_process():
            return
        path = self._path(config)
        if not self._results:  # the jobs have run in processes of a launcher
            results = (TrainingRun(file.parent).result() for file in sorted(path.parent.glob("*/result.json")))
            self._results = [result for result in results if result is not None]
            if self._results:
                write_whole(path, csv_text(*self._table()))
        if not self._results:
            log.warning("%s: no run of the sweep left a result", path.parent)
            return
        columns, rows = self._table()
        print_table(f"{len(rows)} runs in {path.parent}", columns, rows)
        print(json.dumps({"runs": len(rows), "comparison": str(path)}))

    def _path(self, config: DictConfig) -> Path:
        return Path(config.hydra.sweep.dir) / "comparison.csv"

    def _table(self) -> tuple[list[str], list[dict[str, str]]]:
        given = [[one for one in result["overrides"] if not one.startswith("output=")] for result in self._results]
        shared = set.intersection(*map(set, given))
        runs = [
            result | {"run": " ".join(override for override in overrides if override not in shared)}
            for result, overrides in zip(self._results, given, strict=True)
        ]
        best = next(key for key in runs[0] if key.startswith("best_val_"))
        sign = -1 if runs[0]["mode"] == "max" else 1
        runs.sort(key=lambda run: (run[best] is None, sign * (run[best] or 0.0)))
        columns = ["run", *sorted({key for run in runs for key in run if key.startswith("val/")})]
        columns += [best, "steps", "parameters", "seconds"]
        return columns, as_texts(runs)
