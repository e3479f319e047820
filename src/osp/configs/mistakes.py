"""Mistakes in a command, found before anything is composed of it: unknown verbs, options, words and choices."""

import importlib.util
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from osp.configs.groups import groups_of, groups_of_several
from osp.configs.keys import known_keys, nearly
from osp.configs.texts import QUOTED, cut
from osp.documents import read_yaml
from osp.errors import UsageError

_FLAGS = {"-h": "--help", "-m": "--multirun", "-r": "--run", "-i": "--info", "-sc": "--shell-completion"}
_WITH_VALUE = {"-c": "--cfg", "-p": "--package", "-cd": "--config-dir", "-cn": "--config-name"}
_MORE_FLAGS = ("--resolve", "--version", "--hydra-help")


@dataclass(frozen=True)
class Command:
    """A command in its parts: options (with their values, as Hydra takes them), and overrides."""

    options: tuple[str, ...]
    overrides: tuple[str, ...]
    own_configs: Path | None = None

    def has(self, *options: str) -> bool:
        """Whether one of the options is among them."""
        return bool({*options} & {*self.options})


def parsed(arguments: Sequence[str]) -> Command:
    """The parts of a command line. Raises UsageError for an option that there is not, or one without its value."""
    options: list[str] = []
    overrides: list[str] = []
    own_configs = None
    waiting = list(arguments)
    while waiting:
        word = waiting.pop(0)
        if not word.startswith("-"):
            overrides.append(word)
            continue
        name, equals, value = word.partition("=")
        name = (_FLAGS | _WITH_VALUE).get(name, name)
        if name in _WITH_VALUE.values():
            if not equals and not waiting:
                raise UsageError(f"{word}: needs a value after it")
            value = value if equals else waiting.pop(0)
            own_configs = Path(value).expanduser() if name == "--config-dir" else own_configs
            options += [name, str(own_configs) if name == "--config-dir" else value]
        elif name in (*_FLAGS.values(), *_MORE_FLAGS) and not equals:
            options.append(name)
        else:
            known = [*_FLAGS.values(), *_WITH_VALUE.values(), *_MORE_FLAGS]
            raise UsageError(f"{word}: there is no such option{_or(name, known)}; settings are given as KEY=VALUE")
    if own_configs is not None and not own_configs.is_dir():
        raise UsageError(
            f"--config-dir {own_configs}: no such folder; give one with folders of groups, such as experiment"
        )
    return Command(tuple(options), tuple(overrides), own_configs)


def check_words(verb: str, command: Command, configs: Path) -> None:
    """Raise UsageError for a word that is no setting, and for a choice of a group that there is not.

    Overrides are as they were given, but for groups of the verb's own, which have their full name.
    """
    for override in command.overrides:
        key, equals, value = override.partition("=")
        if not equals and not override.startswith("~"):
            known = key in known_keys(verb, configs)
            hint = f"give {key}=VALUE" if known else "a value with spaces needs quotes around all of it"
            raise UsageError(f"{override}: must be KEY=VALUE; {hint}")
        group = key.lstrip("+").partition("@")[0]
        if group == "hydra/launcher":
            _check_launcher(override, value)
        if equals and group in groups_of(verb, configs):
            _check_choices(verb, override, group, value, command, configs)


def unknown_verb(verb: str, verbs: Collection[str]) -> str:
    """The message for an unknown verb."""
    return f"there is no verb {verb!r}{_or(verb, verbs)}; choose {', '.join(verbs)}"


def unknown_key(verb: str, key: str, configs: Path) -> str:
    """The message for a setting that a verb does not have."""
    close = nearly(verb, key, configs)
    by_target = ", which depend on target=..." if verb in ("bench", "eval") else ""
    hint = f"did you mean {' or '.join(close)}?" if close else f"`osp {verb} --help` lists all{by_target}"
    return f"{key}: `osp {verb}` has no such setting here; {hint}"


def _check_choices(verb: str, override: str, group: str, value: str, command: Command, configs: Path) -> None:
    names = {*groups_of(verb, configs)[group]}
    own_files = [] if command.own_configs is None else (command.own_configs / group).glob("*.yaml")
    own = {file.stem: file for file in own_files}
    names |= own.keys()
    chosen = [value]
    if command.has("--multirun"):
        chosen = cut(value)
    if group in groups_of_several(verb, configs):
        chosen = [name for one in chosen for name in cut(one.strip().removeprefix("[").removesuffix("]"))]
    for one in (name.strip() for name in chosen):
        name = one[1:-1] if QUOTED.fullmatch(one) else one
        if name in own:
            read_yaml(own[name], (dict, None))  # Hydra takes a list for nothing at all
        if name and name != "null" and name.removesuffix(".yaml") not in names and "(" not in name and "${" not in name:
            close = _or(name, names)
            said = f"{group.removeprefix(f'{verb}/')}={name}"
            raise UsageError(f"{said}: is not known{close}; choose {', '.join(sorted(names))}")


def _check_launcher(override: str, value: str) -> None:
    """Raise UsageError for a launcher of a sweep whose package is not installed."""
    kind = "joblib" if value == "joblib" else "submitit"
    plugins = importlib.util.find_spec("hydra_plugins")
    places = () if plugins is None else plugins.submodule_search_locations or ()
    there = any((Path(place) / f"hydra_{kind}_launcher").is_dir() for place in places)
    if value in ("slurm", "joblib", "submitit_slurm", "submitit_local") and not there:
        raise UsageError(
            f"{override}: needs the package hydra-{kind}-launcher; install it by `pip install osp[cluster]`"
        )


def _or(word: str, known: Collection[str]) -> str:
    close = get_close_matches(word, [*known], 1)
    return f" (did you mean {close[0]}?)" if close else ""
