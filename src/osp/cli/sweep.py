"""Jobs of a sweep of `osp train` that take several processes: each is a command of its own."""

import sys
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from osp.cli.plain import plain
from osp.configs.texts import quoted
from osp.training.cluster import starts_processes
from osp.training.own_process import RunError, run_train
from osp.training.runs import TrainingRun


def is_own_process_needed(cfg: DictConfig) -> bool:
    """Whether this is a job of a sweep whose further processes would be started with the command of the whole sweep."""
    is_sweep = HydraConfig.get().mode is RunMode.MULTIRUN
    return is_sweep and starts_processes(plain(cfg.trainer).get("devices"), cfg.trainer.get("num_nodes", 1))


def run_job(training: TrainingRun) -> dict[str, Any] | None:
    """Train as this job of the sweep says, by a command of its own; gives its result.

    Raises RunError with the line and the exit code of a job that fails. A signal that ends the job ends the sweep.
    """
    job: Any = HydraConfig.get()
    options = [
        word for one in job.runtime.config_sources if one.provider == "command-line" for word in ("-cd", one.path)
    ]
    overrides = [one for one in job.overrides.hydra if one.lstrip("+").startswith("hydra.searchpath")]
    overrides += [one for one in job.overrides.task if one.lstrip("+").partition("=")[0] != "output"]
    overrides += [f"output={quoted(str(training.folder))}", f"hydra.job.num={job.job.num}"]
    outcome = run_train(overrides, options)
    if outcome.signal is not None:
        sys.exit(128 + outcome.signal)
    if outcome.code:
        raise RunError(outcome.said, outcome.code)
    return training.result()
