"""Versions that do not go together, in one table, and the least ones that the project asks for."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata

Version = tuple[int, ...]


def release(version: str) -> Version:
    """The numbers of a version: `2.9.0a0+git` -> (2, 9, 0)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


@dataclass(frozen=True)
class Conflict:
    """Versions of a package that are bad; `why` and `mend` are shown."""

    package: str
    is_bad: Callable[[Version], bool]
    why: str
    mend: str


def _is(*versions: Version) -> Callable[[Version], bool]:
    return lambda version: version[:3] in versions


def _below(limit: Version) -> Callable[[Version], bool]:
    return lambda version: version < limit


_LIGHTNING = "pip install 'lightning>=2.6.6'"
CONFLICTS = (
    Conflict(
        "lightning",
        _is((2, 6, 2), (2, 6, 3)),
        "was published with malicious code (GHSA-w37p-236h-pfx3)",
        f"remove it, change all passwords and keys that were on this machine, {_LIGHTNING}",
    ),
    Conflict("lightning", _below((2, 6, 6)), "can run code from a checkpoint (GHSA-qqmf-gpg7-g8gw)", _LIGHTNING),
    Conflict(
        "torch", _below((2, 9)), "is older than 2.9, whose attention kernels and FSDP2 are needed", "update torch"
    ),
    Conflict("hydra-core", _below((1, 3, 2)), "cannot compose these configurations", "pip install 'hydra-core>=1.3.2'"),
)
"""The first row that a version fits is told."""


def known_conflict(package: str, version: str) -> Conflict | None:
    """The row of the table for an installed version; None: nothing is known against it."""
    rows = (row for row in CONFLICTS if row.package == package and row.is_bad(release(version)))
    return next(rows, None)


def torchvision_of(torch_version: str) -> str:
    """The minor version of torchvision that goes with a torch: 2.9 -> 0.24, 2.13 -> 0.28."""
    major, minor = release(torch_version)[:2]
    return f"0.{minor + 15}" if major == 2 else "?"


def required(distribution: str = "osp") -> Iterator[tuple[str, str]]:
    """The packages that the installed project needs, each with its least version (empty: any).

    Nothing comes where it is run from its source tree without being installed.
    """
    try:
        listed = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        return
    for one in listed:
        found = re.match(r"([\w.-]+)\s*\(?(?:>=\s*([\d.]+))?", one)
        if found and "extra ==" not in one:
            yield found[1], found[2] or ""
