"""Whether all settings that Hydra composed of a command are read, and the help that lists a verb's settings."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from osp.cli.overrides import config_folder, prepared
from osp.cli.plain import plain
from osp.configs.groups import groups_of
from osp.configs.help import help_text
from osp.configs.mistakes import Command
from osp.configs.texts import in_quotes
from osp.configs.unread import Given, unread
from osp.errors import UsageError


def check_read(
    verb: str, cfg: DictConfig, overrides: Sequence[str], choices: Mapping[str, Any], free: Collection[str] = ()
) -> Collection[str]:
    """Raise UsageError for the first override that nothing in the configuration reads; gives those of `free` ones.

    Overrides with null, and those that take something away, are always allowed.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    given = [
        Given(str(one.input_line), (one.package or one.key_or_group).replace("/", "."), "+" in str(one.input_line)[:2])
        for one in {one.key_or_group: one for one in parsed}.values()  # of several for one key the last counts
        if not one.is_delete() and one.value() is not None and not one.key_or_group.startswith("hydra")
    ]
    config = plain(cfg, resolve=False)
    found = unread(verb, config, given, _names(verb, config, choices), config_folder())
    for override, hint in found.items():
        if override not in free:
            raise UsageError(f"{override}: nothing reads it here; {hint or 'leave it out'}")
    return found


def help_of(verb: str, command: Command) -> str:
    """The help of a verb with the overrides and the folder of configurations of a command."""
    overrides = prepared(verb, command, config_folder())
    if command.own_configs is not None:
        overrides.append(f"hydra.searchpath=[{in_quotes(f'file://{command.own_configs.absolute()}')}]")
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        cfg = compose(verb, overrides, return_hydra_config=True)
    config = {key: value for key, value in plain(cfg, resolve=False).items() if key != "hydra"}
    names = _names(verb, config, cfg.hydra.runtime.choices)
    return help_text(verb, config, names, config_folder(), fields_of(verb, config))


def fields_of(verb: str, config: Mapping[str, Any]) -> dict[str, str]:
    """The meanings of settings that the code declares: those of sampling, if the verb has them."""
    if verb != "sample" and config.get("target") != "generation":
        return {}
    from osp.sampling.settings import setting_meanings  # here: other verbs start without it

    return setting_meanings()


def _names(verb: str, config: Mapping[str, Any], choices: Mapping[str, Any]) -> dict[str, list[str]]:
    """The choices of each group; Hydra names the choices of a group that takes several in the configuration only."""
    names = {str(group): [] if choice is None else [str(choice)] for group, choice in choices.items()}
    for group, known in groups_of(verb, config_folder()).items():
        if group not in choices and group in config:
            names[group] = [name for name in config[group] or () if name in known]
    return names
