"""`osp doctor`: what a machine is asked before it trains for long."""

import time
from pathlib import Path
from typing import Any

from hydra.utils import to_absolute_path
from omegaconf import DictConfig

from osp.audit.doctor.result import summary
from osp.audit.doctor.run import chosen_checks, chosen_devices, configured_values, examine, report
from osp.audit.doctor.subject import Subject
from osp.checks import check_number
from osp.cli.overrides import config_folder
from osp.cli.plain import plain
from osp.cli.printing import show, show_result
from osp.devices import choose_device
from osp.errors import OspError
from osp.files import write_json


def run(cfg: DictConfig) -> dict[str, Any]:
    """Ask, and print a line for each answer as it comes; gives the report.

    Raises UsageError before anything is asked for settings that make no sense, and OspError if an answer is a failure.
    """
    check_number("limit", cfg.limit, above=0)
    check_number("workers", cfg.workers, 0, whole=True)
    settings, began, conf = plain(cfg), time.monotonic(), config_folder()
    checks = chosen_checks(settings["only"], settings["skip"])
    subject = Subject(
        devices=chosen_devices(choose_device(cfg.device), settings["devices"]),
        folder=Path(to_absolute_path(cfg.folder)),
        workers=cfg.workers,
        limit=cfg.limit,
        head_dims=configured_values(conf / "denoiser", "head_dim"),
        vae_channels=[n for n in configured_values(conf / "vae", "base_channels") if n >= 64],
    )
    results = []
    for result in examine(subject, checks):
        show(str(result))
        results.append(result)
    show(summary(results))
    made = report(subject, results, time.monotonic() - began)
    if cfg.output is not None:
        output = Path(to_absolute_path(cfg.output))
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, made)
    if wrong := [result.name for result in results if result.state == "failed"]:
        show_result(made)
        raise OspError(f"{len(wrong)} of {len(results)} failed: {', '.join(dict.fromkeys(wrong))}")
    return made
