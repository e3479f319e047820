"""The groups of configurations that each verb chooses from."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import yaml


@cache
def groups_of(verb: str, configs: Path) -> dict[str, tuple[str, ...]]:
    """The choices of each group of a verb, in the order of its file, then those of groups that a choice brings in."""
    found: dict[str, tuple[str, ...]] = {}
    waiting = [configs / f"{verb}.yaml"]
    while waiting:
        for group in _named(waiting.pop(0)):
            if group not in found:
                files = sorted((configs / group).glob("*.yaml"))
                found[group] = tuple(file.stem for file in files)
                waiting += files
    return found


def _named(file: Path) -> Iterator[str]:
    """The groups in the list `defaults` of a file, by their path from the top; not those of Hydra itself."""
    content = yaml.safe_load(file.read_text()) or {}
    for entry in content.get("defaults", []):
        name = next(iter(entry)) if isinstance(entry, dict) else ""
        name = name.removeprefix("override ").partition("@")[0].removeprefix("/")
        if name and not name.startswith("hydra/"):
            yield name
