"""The overrides of a command line, before Hydra reads them."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from osp.configs.groups import groups_of_several
from osp.configs.mistakes import Command, check_words
from osp.configs.paths import has_paths_by_number, is_path, may_be_a_mapping
from osp.configs.texts import QUOTED, cut, in_quotes, quoted, with_quoted_conditions
from osp.errors import UsageError

# Whatever these are, they are text: Hydra's own grammar takes `null` and `1` for values, and commas for a sweep.
_TEXTS = ("prompt", "template", "negative_prompt", "usual_negative", "negative_template")


def config_folder() -> Path:
    """The folder of configurations: inside an installed package, or at the top of a checkout."""
    installed = Path(__file__).parent.parent / "conf"
    return installed if installed.is_dir() else Path(__file__).parents[3] / "conf"


def prepared(verb: str, command: Command, configs: Path) -> list[str]:
    """The overrides of a command as Hydra takes them; `configs` is the folder of all configurations.

    Texts and paths are quoted, so that whatever they hold they are what was given. Raises UsageError for an override
    that Hydra takes for something else than is meant.
    """
    overrides = with_own_groups(verb, command.overrides, configs)
    check_choices(verb, overrides, configs)
    check_words(verb, replace(command, overrides=tuple(overrides)), configs)
    if verb in ("sample", "eval"):
        overrides = with_quoted_prompts(overrides)
    return with_quoted_paths(verb, with_quoted_conditions(overrides), command.has("--multirun"))


def with_quoted_prompts(overrides: Sequence[str]) -> list[str]:
    """The overrides with prompts in quotes, unless they are in quotes already."""
    prepared = []
    for override in overrides:
        key, equals, value = override.partition("=")
        is_bare = equals and key in _TEXTS and not QUOTED.fullmatch(value.strip())
        prepared.append(f"{key}={in_quotes(value)}" if is_bare else override)
    return prepared


def with_quoted_paths(verb: str, overrides: Sequence[str], is_multirun: bool = False) -> list[str]:
    """The overrides with paths in quotes where they need some.

    A value is first of all the name of a file or folder that is there. Else `null`, a text in quotes and a list in
    brackets are what they are elsewhere, and `~` is a home. In a multirun, commas stand between several; not those of
    `output`, which all jobs share. Raises UsageError for an empty path.
    """
    prepared = []
    for override in overrides:
        key, equals, value = override.partition("=")
        name = key.lstrip("+")
        if not equals or not (is_path(verb, name) or has_paths_by_number(verb, name)):
            prepared.append(override)
            continue
        several = is_multirun and name != "output" and not _is_there(value)
        values = cut(value) if several else [value]
        prepared.append(f"{key}={','.join(_value(verb, name, one) for one in values)}")
    return prepared


def is_prompt_with_commas(overrides: Sequence[str]) -> bool:
    """Whether a prompt among the overrides has commas that might be meant for a sweep, and stands in no quotes."""
    return any("," in one for one in {*overrides} - {*with_quoted_prompts(overrides)})


def _value(verb: str, key: str, value: str) -> str:
    """A value of a setting that is a path, as Hydra takes it."""
    if has_paths_by_number(verb, key):
        return _numbered(value) if value.startswith("{") else value
    if _is_there(value):
        return _path(key, value)
    if value.strip() == "null" or QUOTED.fullmatch(value.strip()):
        return value
    if may_be_a_mapping(key) and value.lstrip().startswith("{"):
        return value
    if key != "output" and value.startswith("[") and value.endswith("]"):
        listed = [one.strip() for one in cut(value[1:-1])] if value[1:-1].strip() else []
        return f"[{','.join(one if QUOTED.fullmatch(one) else _path(key, one) for one in listed)}]"
    return _path(key, value)


def _numbered(value: str) -> str:
    """The value of a mapping from numbers to paths: `{0: a.png, -1: b.png}`."""
    entries = []
    for entry in cut(value.strip()[1:-1]):
        number, colon, path = entry.partition(":")
        path = path.strip()
        entries.append(entry if not colon or QUOTED.fullmatch(path) else f"{number.strip()}: {_path('given', path)}")
    return f"{{{', '.join(entries)}}}"


def _path(key: str, value: str) -> str:
    if not value:
        raise UsageError(f"{key}=: is empty; give a path")
    if value.startswith("~") and not _is_there(value):
        value = os.path.expanduser(value)
    # "???" would mean "has to be given", so the file of that name gets another spelling.
    return quoted(f"./{value}" if value == "???" else value)


def _is_there(value: str) -> bool:
    try:
        return bool(value) and os.path.lexists(value)
    except ValueError:  # a null byte
        return False


def with_own_groups(verb: str, overrides: Sequence[str], configs: Path) -> list[str]:
    """The overrides with a verb's own groups by their full name: `target=vae` of bench is `bench/target=vae`."""
    own = {path.name for path in (configs / verb).glob("*/")}
    return [f"{verb}/{override}" if override.partition("=")[0] in own else override for override in overrides]


def check_choices(verb: str, overrides: Sequence[str], configs: Path) -> None:
    """Raise UsageError for a group in `configs` of which nothing is chosen in a way that Hydra does not take."""
    several = groups_of_several(verb, configs)
    for override in overrides:
        key, _, value = override.partition("=")
        if (group := key.lstrip("~+/")) in several and (value == "null" or key.startswith("~")):
            raise UsageError(f"{override}: several may be chosen of this group, and {group}=[] chooses none")
        if value == "null" and (configs / key.partition("@")[0].lstrip("+/")).is_dir():
            raise UsageError(f"{override}: a choice is left out by '~{key.lstrip('+')}', in quotes")
