"""`osp VERB --help`: the settings of a verb, each with its default and the comment that it has in `conf`."""

import shlex
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from osp.configs.examples import EXAMPLES
from osp.configs.groups import groups_of
from osp.configs.meanings import choice_meanings, heading, meanings
from osp.configs.reads import Config
from osp.configs.unread import Choices, is_read

_WIDTH = 120
_MEANING = 40  # the column where meanings begin
_LONG = 72  # a value of more characters is shown key by key, or not


def help_text(
    verb: str, config: Config, choices: Choices, configs: Path, fields: Mapping[str, str] | None = None
) -> str:
    """Groups and settings of a verb; `config` and `choices` stand for the defaults.

    Of the choices that a configuration has, those are listed whose settings it reads. `fields` are meanings of settings
    that stand in the code; a comment comes before them.
    """
    file = configs / f"{verb}.yaml"
    groups = {group: names for group, names in groups_of(verb, configs).items() if group in choices}
    said = {**(fields or {}), **meanings(file)}
    for group in groups:
        for name in _ours(configs, group, choices[group]):
            said |= choice_meanings(configs, group, name)
    lines = [*textwrap.wrap(heading(file), _WIDTH), "", f"osp {verb} KEY=VALUE ...  (??? has to be given)"]
    lines += ["", "Choices of groups:"] if groups else []
    for group, names in groups.items():
        chosen = ",".join(choices[group]) or "null"
        lines += _line(f"{group.removeprefix(f'{verb}/')}={chosen}", said.get(f"{group}=", ""))
        lines += textwrap.wrap(", ".join(names), _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
    lines += ["", "Settings:"]
    apart = {*groups, *(group.removeprefix(f"{verb}/") for group in groups)}
    lines += [line for key in config if key not in apart for line in _listed(key, config[key], said)]
    for group in groups:
        if choices[group] and isinstance(config.get(group), dict) and is_read(verb, config, group):
            lines += _part(group, config[group], choices[group], said, configs)
    lines += ["", "Examples:", *_examples(verb)]
    return "\n".join(lines)


def _ours(configs: Path, group: str, names: Sequence[str]) -> list[str]:
    """The choices that stand in our folder; others are of a folder of the user's own (--config-dir)."""
    return [name for name in names if (configs / group / f"{name}.yaml").is_file()]


def _examples(verb: str) -> Iterator[str]:
    """Each example as what it does, and its command, which is broken as a shell allows it."""
    for about, arguments in EXAMPLES[verb]:
        yield f"  {about}:"
        words = shlex.join(arguments).replace("'", '"') if "'" not in "".join(arguments) else shlex.join(arguments)
        command = f"osp {verb} {words}"
        lines = textwrap.wrap(
            command, _WIDTH - 8, initial_indent=" " * 6, subsequent_indent=" " * 8, break_on_hyphens=False
        )
        yield from (f"{line} \\" for line in lines[:-1])
        yield lines[-1]


def _part(group: str, part: Config, names: Sequence[str], said: Mapping[str, str], configs: Path) -> Iterator[str]:
    """The settings of what is chosen of a group."""
    about = " ".join(heading(configs / group / f"{name}.yaml") for name in _ours(configs, group, names))
    yield ""
    yield from textwrap.wrap(f"Settings of {group}={','.join(names)}. {about}", _WIDTH)
    for name, value in part.items():
        yield from _listed(f"{group}.{name}", value, said)


def _listed(key: str, value: Any, said: Mapping[str, str]) -> Iterator[str]:
    """The lines of a setting; of a mapping a line a key, if these have meanings of their own or are many."""
    shown = _shown(value)
    if key.endswith("_target_"):
        return
    if isinstance(value, dict) and value and (len(shown) > _LONG or any(name.startswith(f"{key}.") for name in said)):
        yield from _line(f"{key}:", said[key]) if key in said else ()
        for name, inner in value.items():
            yield from _listed(f"{key}.{name}", inner, said)
    else:
        yield from _line(f"{key}={shown if len(shown) <= _LONG else '[...]'}", said.get(key, ""))


def _line(setting: str, meaning: str) -> Iterator[str]:
    """A setting with its meaning beside it, or below it where it is long."""
    first = f"  {setting}"
    if len(first) > _MEANING - 2 and meaning:
        yield first
        first = ""
    for paragraph in meaning.splitlines() or [""]:
        for line in textwrap.wrap(
            paragraph, _WIDTH - _MEANING, subsequent_indent="" if paragraph[:1] != " " else "    "
        ) or [""]:
            yield f"{first:{_MEANING}}{line}".rstrip()
            first = ""


def _shown(value: Any) -> str:
    """A value as it is given on a command line."""
    if isinstance(value, str):
        return value or '""'
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6).removesuffix("...\n").strip()
