"""All settings that a verb may have, whatever is chosen, and those that are nearly called like another name."""

from collections.abc import Iterator
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from osp.configs.groups import groups_of

_MOST = 3  # suggestions


@cache
def known_keys(verb: str, configs: Path) -> frozenset[str]:
    """The whole names of the settings in a verb's file and in all choices of its groups, and of the groups."""
    found = {key for key in _keys(configs / f"{verb}.yaml", "") if not key.startswith("hydra")}
    for group, names in groups_of(verb, configs).items():
        found.add(group.removeprefix(f"{verb}/"))
        for name in names:
            file = configs / group / f"{name}.yaml"
            found |= {*_keys(file, "" if file.read_text().startswith("# @package _global_") else f"{group}.")}
    return frozenset(found)


def nearly(verb: str, key: str, configs: Path) -> list[str]:
    """The settings of a verb that a wrong key may have been meant for: of its own last name, or nearly written so."""
    known = sorted(known_keys(verb, configs))
    same = [one for one in known if one.endswith(f".{key}")]
    if same or "." not in key:
        by_name = {one.rpartition(".")[2]: one for one in reversed(known)}
        close = get_close_matches(key, [*by_name], _MOST, 0.75)
        return (same or list(dict.fromkeys(one for name in close for one in _called(name, known))))[:_MOST]
    return get_close_matches(key, known, _MOST, 0.75)


def _called(name: str, known: list[str]) -> list[str]:
    """The keys of this last name, those at the top first."""
    return sorted((one for one in known if one.rpartition(".")[2] == name), key=lambda one: one.count("."))


def _keys(file: Path, prefix: str) -> Iterator[str]:
    content = yaml.safe_load(file.read_text())
    yield from _flat({key: value for key, value in (content or {}).items() if key != "defaults"}, prefix)


def _flat(value: dict[Any, Any], prefix: str) -> Iterator[str]:
    for key, inner in value.items():
        if key == "_target_":
            continue
        yield f"{prefix}{key}"
        if isinstance(inner, dict):
            yield from _flat(inner, f"{prefix}{key}.")
