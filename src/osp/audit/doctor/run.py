"""All questions to a machine, and the report."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml

from osp import __version__
from osp.audit.doctor.result import Result, counts, failed
from osp.audit.doctor.subject import Subject
from osp.checks import check_choice
from osp.devices import describe_device
from osp.devices.inventory import all_devices
from osp.errors import UsageError

Check = Callable[[Subject], Iterator[Result]]

_ROOM = "osp.audit.doctor"
CHECKS = {
    "versions": f"{_ROOM}.versions.check_versions",
    "drivers": f"{_ROOM}.drivers.check_drivers",
    "devices": f"{_ROOM}.machine.check_devices",
    "host": f"{_ROOM}.machine.check_host",
    "attention": f"{_ROOM}.attention.check_attention",
    "norms": f"{_ROOM}.layers.check_norms",
    "rotary": f"{_ROOM}.layers.check_rotary",
    "convolution": f"{_ROOM}.layers.check_convolution",
    "matmul": f"{_ROOM}.layers.check_matmul",
    "collectives": f"{_ROOM}.exchange.check_collectives",
    "speed": f"{_ROOM}.speed.check_speed",
    "training": f"{_ROOM}.steps.check_training",
    "checkpoint": f"{_ROOM}.steps.check_checkpoint",
}
"""The checks in order, by name: functions, imported when they are run, since packages of one may be missing."""


def chosen_checks(only: Sequence[str] | None, skip: Sequence[str]) -> list[str]:
    """The names of the checks to run. Raises UsageError for an unknown one, and if none is left."""
    for key, names in (("only", only or ()), ("skip", skip)):
        for name in names:
            check_choice(key, name, CHECKS)
    chosen = [name for name in CHECKS if (only is None or name in only) and name not in skip]
    if not chosen:
        raise UsageError(f"only={only} skip={skip}: leaves no check; choose some of {', '.join(CHECKS)}")
    return chosen


def chosen_devices(device: torch.device, numbers: Sequence[int] | None) -> list[torch.device]:
    """The devices of this kind with these numbers; None: all. Raises UsageError for one that is not here."""
    here = all_devices(device)
    if numbers is None:
        return here
    known = {one.index or 0: one for one in here}
    for number in numbers:
        check_choice("devices", number, known)
    if not numbers:
        raise UsageError("devices=[]: leaves none; give numbers, or null for all")
    return [known[number] for number in dict.fromkeys(numbers)]


def examine(subject: Subject, checks: Sequence[str]) -> Iterator[Result]:
    """The answers, as they come. A check that breaks is an answer too."""
    for name in checks:
        try:
            module, _, function = CHECKS[name].rpartition(".")
            yield from getattr(import_module(module), function)(subject)
        except ImportError as error:
            missing = error.name or str(error)
            yield failed(
                f"{name}.check", f"needs {missing}, which cannot be imported here", "see the lines of versions"
            )
        except Exception as error:  # noqa: BLE001  a broken machine breaks in any way, and the others are asked too
            reason = " ".join(str(error).split())[:300] or "no reason given"
            yield failed(f"{name}.check", f"{type(error).__name__}: {reason}", "report it, with this report")


def report(subject: Subject, results: Sequence[Result], seconds: float) -> dict[str, Any]:
    """The report as plain values."""
    return {
        "osp": __version__,
        "torch": torch.__version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": round(seconds, 1),
        "devices": {str(device): describe_device(device) for device in subject.devices},
        **counts(results),
        "results": [result.plain() for result in results],
    }


def configured_values(folder: Path, key: str) -> list[int]:
    """All values that the configurations in a folder give to a key, in rising order."""
    contents = [yaml.safe_load(path.read_text()) for path in sorted(folder.glob("*.yaml"))]
    return sorted({one[key] for one in contents if isinstance(one, Mapping) and isinstance(one.get(key), int)})
