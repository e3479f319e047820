"""The meanings of settings, which are the comments in the files of configurations."""

import re
from collections.abc import Iterator
from pathlib import Path

import yaml


def heading(file: Path) -> str:
    """The comment that a file begins with, as one paragraph."""
    lines = []
    for line in file.read_text().splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.removeprefix("#").strip())
    return " ".join(lines)


def meanings(file: Path, prefix: str = "") -> dict[str, str]:
    """The comment of each key in a file, by its path below `prefix`: the end of its line, or the lines above.

    A group in the list `defaults` is called `GROUP=`.
    """
    text = file.read_text()
    root = yaml.compose(text)
    lines = text.splitlines()
    if not isinstance(root, yaml.MappingNode) or not root.value:
        return {}
    first = root.value[0][0].start_mark.line
    return {
        path: comment
        for path, key, value in _keys(root, prefix)
        if (comment := _after(lines, key, value) or _above(lines, key, first))
    }


def choice_meanings(configs: Path, group: str, name: str) -> dict[str, str]:
    """The comments of a choice of a group and of those that it goes on from, by their paths in a configuration."""
    file = configs / group / f"{name}.yaml"
    text = file.read_text()
    found: dict[str, str] = {}
    for base in (yaml.safe_load(text) or {}).get("defaults", []):
        if isinstance(base, str) and base != "_self_":
            found |= choice_meanings(configs, group, base)
    return found | meanings(file, "" if text.startswith("# @package _global_") else f"{group}.")


def _keys(node: yaml.MappingNode, prefix: str) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
    """Each key that has a line of its own: its path, its node, and that of its value."""
    for key, value in node.value:
        if key.value == "defaults" and isinstance(value, yaml.SequenceNode):
            for entry in value.value:
                for group, choice in entry.value if isinstance(entry, yaml.MappingNode) else ():
                    yield f"{group.value.split()[-1].lstrip('/')}=", group, choice
            continue
        yield f"{prefix}{key.value}", key, value
        if isinstance(value, yaml.MappingNode) and not value.flow_style:
            yield from _keys(value, f"{prefix}{key.value}.")


def _after(lines: list[str], key: yaml.Node, value: yaml.Node) -> str:
    """The comment at the end of a key's line."""
    end = value.end_mark if value.end_mark.line == key.end_mark.line else key.end_mark
    found = re.search(r"\s#\s*(.*)", lines[end.line][end.column :])
    return found[1].strip() if found else ""


def _above(lines: list[str], key: yaml.Node, first: int) -> str:
    """The comment above a key, further in than which a line begins anew; not the heading, which ends before `first`."""
    found: list[str] = []
    for line in reversed(lines[first : key.start_mark.line]):
        if not line.startswith(" " * key.start_mark.column + "#"):
            break
        found.insert(0, line.strip().removeprefix("#").removeprefix(" "))
    return re.sub(r"\n(?! )", " ", "\n".join(found))
