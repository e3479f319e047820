"""References from one setting to another: what is read along them, in plain configurations that are not resolved."""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

# ${clip.frames}, ${..seed}, ${oc.select:path,null}
_REFERENCE = re.compile(r"(?<!\\)\$\{\s*(?:oc\.select:)?\s*(\.*[\w.\[\]-]+)\s*[},$]")


def reached_from(config: Mapping[str, Any], roots: Collection[str]) -> set[str]:
    """The paths of all that is read, from those that the verb reads itself along the references."""
    reached: set[str] = set()
    waiting = [*roots]
    while waiting:
        if (path := waiting.pop()) not in reached:
            reached.add(path)
            waiting += [reference for _, reference in references(value_at(config, path), path)]
    return reached


def references(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Each reference in a value that stands at `path`: where it stands, and to what."""
    if isinstance(value, Mapping | list):
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from references(inner, f"{path}.{key}")
    elif isinstance(value, str):
        for name in _REFERENCE.findall(value):
            inside = path.split(".")[: -(len(name) - len(name.lstrip(".")))] if name.startswith(".") else []
            yield path, ".".join([*inside, name.strip(".").replace("[", ".").replace("]", "")])


def value_at(config: Any, path: str) -> Any:
    """The value at a path, or the reference on the way there that would have to be followed."""
    for key in path.split("."):
        if isinstance(config, list) and key.isdigit() and int(key) < len(config):
            config = config[int(key)]
        elif isinstance(config, Mapping):
            config = config.get(key)
        else:
            break
    return config


def related(one: str, other: str) -> bool:
    """Whether two paths are the same, or one lies within the other."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def missing_keys(value: Any, key: str = "") -> Iterator[str]:
    """The keys that have to be given; references to them are not followed, so each comes once."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from missing_keys(inner, f"{key}.{name}" if key else name)
    elif value == "???":
        yield key
