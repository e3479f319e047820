"""Whether the versions of Python and of the packages go together, and what is missing."""

import platform
import sys
from collections.abc import Callable, Iterator

from osp.audit.doctor.conflicts import known_conflict, release, required, torchvision_of
from osp.audit.doctor.result import Result, failed, not_applicable, passed, warning
from osp.audit.doctor.subject import Subject

Installed = Callable[[str], str | None]

_PYTHON = (3, 11)
_NAMED = ("torch", "lightning", "torchvision", "numpy", "hydra-core")  # a line each
_OPTIONAL = {
    "wandb": "logger=wandb",
    "triton": "attention with padding on a GPU without masks in memory, and compiled models",
    "datasets": "data=huggingface",
    "submitit": "sweeps over SLURM",
}
"""Packages that a part of the project needs, and which."""


def check_versions(subject: Subject) -> Iterator[Result]:
    """Lines for Python, for the packages that matter most, and one for all others."""
    yield _python()
    for package in _NAMED:
        yield package_line(package, subject.version, dict(required()).get(package, ""))
    yield others(subject.version)
    yield optional(subject.version)


def package_line(package: str, installed: Installed, least: str) -> Result:
    """A package: missing, known to be bad, too old, or not the one that goes with torch."""
    name, version = f"versions.{package}", installed(package)
    if version is None:
        return failed(name, "is not installed", f"pip install {package}")
    if bad := known_conflict(package, version):
        return failed(name, f"{version} {bad.why}", bad.mend)
    if release(version) < release(least):
        return failed(name, f"{version}, and at least {least} is needed", f"pip install '{package}>={least}'")
    torch = installed("torch")
    if package == "torchvision" and torch is not None:
        wanted = torchvision_of(torch)
        if release(version)[:2] != release(wanted):
            return failed(
                name,
                f"{version} does not go with torch {torch}, which goes with {wanted}",
                f"pip install 'torchvision=={wanted}.*', with torch=={torch} as a constraint",
            )
        builds = [one.partition("+")[2] for one in (torch, version)]
        if all(builds) and builds[0] != builds[1]:
            mend = f"install the torchvision that is built for {builds[0]}, from where torch came"
            return warning(name, f"{version} and torch {torch} are built for different devices", mend)
        return passed(name, f"{version}, which goes with torch {torch}")
    return passed(name, version)


def others(installed: Installed) -> Result:
    """All other packages that the project needs."""
    name, needed = "versions.packages", {key: least for key, least in required() if key not in _NAMED}
    if not needed:
        return not_applicable(name, "osp is run from its source tree; its requirements are in pyproject.toml")
    missing = [package for package in needed if installed(package) is None]
    if missing:
        return failed(name, f"missing: {', '.join(missing)}", f"pip install {' '.join(missing)}")
    old = [
        f"{package}>={least}" for package, least in needed.items() if release(installed(package) or "") < release(least)
    ]
    if old:
        has = ", ".join(f"{one.split('>=')[0]} {installed(one.split('>=')[0])}" for one in old)
        return failed(name, f"too old: {has}", "pip install " + " ".join(f"'{one}'" for one in old))
    return passed(name, f"{len(needed)} more packages are there, and new enough")


def optional(installed: Installed) -> Result:
    """Packages that only a part of the project needs."""
    name = "versions.optional"
    here = [f"{package} {version}" for package in _OPTIONAL if (version := installed(package)) is not None]
    missing = [f"{package} ({purpose})" for package, purpose in _OPTIONAL.items() if installed(package) is None]
    if not here:
        return not_applicable(name, f"not installed, and not needed without: {', '.join(missing)}")
    lacking = f"; not here: {', '.join(missing)}" if missing else ""
    return passed(name, ", ".join(here) + lacking)


def _python() -> Result:
    version = platform.python_version()
    if sys.version_info < _PYTHON:
        return failed("versions.python", f"{version}, and at least 3.11 is needed", "make an environment of 3.11")
    return passed("versions.python", f"{version} ({platform.system()} {platform.machine()})")
