"""The settings that a command gives and nothing reads: a setting without effect is the user's mistake."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from osp.configs.groups import groups_of
from osp.configs.reads import BY_REFERENCE, SOMETIMES, Config
from osp.configs.references import reached_from, references, related, value_at

Choices = Mapping[str, Sequence[str]]
"""The choices of each group: none, one, or several."""


@dataclass(frozen=True)
class Given:
    """A setting as a command gives it (`said`), its `key` with dots, and whether the key may be a new one."""

    said: str
    key: str
    may_be_new: bool = False


def unread(verb: str, config: Config, given: Sequence[Given], choices: Choices, configs: Path) -> dict[str, str]:
    """The given settings without effect, as they were said, each with what would read it (empty: nothing would).

    `config` is a verb's configuration with its references as they stand, `configs` is the folder of all.
    """
    may_be_new = [one.key for one in given if one.may_be_new]
    new = {*may_be_new, *(key.partition(".")[0] for key in may_be_new)} - _declared(verb, configs)
    read = _read(verb, config, new)
    return {
        one.said: _hint(verb, one.key, config, choices, configs)
        for one in given
        if one.key.partition(".")[0] in config and not any(related(one.key, path) for path in read)
    }


def is_read(verb: str, config: Config, key: str) -> bool:
    """Whether anything of a key has an effect in a verb's configuration."""
    return any(related(key, path) for path in _read(verb, config))


def _read(verb: str, config: Config, new: Collection[str] = ()) -> set[str]:
    """The paths of what is read; of `new` keys only what others refer to."""
    sometimes = SOMETIMES.get(verb, {})
    roots = [path for path in _paths(config, sometimes) if path not in sometimes or sometimes[path].holds(config)]
    return reached_from(config, [path for path in roots if path not in new])


def _paths(config: Config, sometimes: Collection[str]) -> Iterator[str]:
    """The keys at the top, or those below one of which only a part is read at times."""
    for key, value in config.items():
        in_parts = isinstance(value, Mapping) and any(path.startswith(f"{key}.") for path in sometimes)
        yield from (f"{key}.{name}" for name in value) if in_parts else (key,)


def _declared(verb: str, configs: Path) -> set[str]:
    """All keys at the top that the verb's own files have, and all groups."""
    files = [configs / f"{verb}.yaml", *(configs / verb).rglob("*.yaml")]
    return {key for file in files for key in yaml.safe_load(file.read_text())} | groups_of(verb, configs).keys()


def _hint(verb: str, key: str, config: Config, choices: Choices, configs: Path) -> str:
    sometimes = SOMETIMES.get(verb, {})
    where = sometimes.get(key, sometimes.get(key.partition(".")[0], BY_REFERENCE)).say
    readers = [f"it is read with {where}"] if where else []
    others = []
    for group, name, path in _readers(verb, key, choices, configs):
        if name not in choices[group]:
            others.append(f"{group}={name}")
        elif "${" in str(now := value_at(config, path)) and group != key.partition(".")[0]:
            readers.append(_hint(verb, group, config, choices, configs))
        else:
            readers.append(f"{path}={'null' if now is None else now} stands where it would be read")
    listed = f"it is read with {' or '.join(dict.fromkeys(others))}" if others else ""
    return next((reader for reader in (*readers, listed) if reader), "")


def _readers(verb: str, key: str, choices: Choices, configs: Path) -> Iterator[tuple[str, str, str]]:
    """Group, name and path of each reference to the key in what could be chosen."""
    for group, names in groups_of(verb, configs).items():
        for name in names if group in choices else ():
            for path, reference in _references_in(configs, group, name):
                if related(key, reference):
                    yield group, name, path


def _references_in(configs: Path, group: str, name: str) -> Iterator[tuple[str, str]]:
    """The references in a choice of a group, where they stand in a configuration with it."""
    text = (configs / group / f"{name}.yaml").read_text()
    for key, value in (yaml.safe_load(text) or {}).items():
        yield from references(value, key if text.startswith("# @package _global_") else f"{group}.{key}")
