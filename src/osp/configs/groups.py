"""The groups of configurations that each verb chooses from."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml


@cache
def groups_of(verb: str, configs: Path) -> dict[str, tuple[str, ...]]:
    """The choices of each group of a verb, in the order of its file, then those of groups that a choice brings in.

    A file whose name begins with `_` is a part that choices share, and none itself.
    """
    found: dict[str, tuple[str, ...]] = {}
    waiting = [configs / f"{verb}.yaml"]
    while waiting:
        for group in _named(waiting.pop(0)):
            if group not in found:
                files = sorted((configs / group).glob("*.yaml"))
                found[group] = tuple(file.stem for file in files if not file.stem.startswith("_"))
                waiting += files
    return found


@cache
def groups_of_several(verb: str, configs: Path) -> frozenset[str]:
    """The groups of which a verb takes several choices: those with a list in its file."""
    entries = _defaults(configs / f"{verb}.yaml")
    return frozenset(name for entry in entries for name, choice in entry.items() if isinstance(choice, list))


def _defaults(file: Path) -> list[dict[str, Any]]:
    """The entries of the list `defaults` of a file that choose from a group."""
    listed = (yaml.safe_load(file.read_text()) or {}).get("defaults", [])
    return [entry for entry in listed if isinstance(entry, dict)]


def _named(file: Path) -> Iterator[str]:
    """The groups in the list `defaults` of a file, by their path from the top; not those of Hydra itself."""
    for entry in _defaults(file):
        name = next(iter(entry)).removeprefix("override ").partition("@")[0].removeprefix("/")
        if not name.startswith("hydra/"):
            yield name
