"""The one line that a user is shown of an exception that the user can mend."""

import re
import sys

from osp.cli.overrides import config_folder
from osp.configs.groups import groups_of
from osp.configs.meanings import choice_meanings, meanings
from osp.configs.mistakes import unknown_key
from osp.errors import OspError, UsageError, machine_error


def user_error(error: BaseException, verb: str) -> OspError | None:
    """The error of a verb to show in one line, if the user can mend it; None for a bug.

    Raises KeyboardInterrupt where that is what has caused it: modules in C that are imported while ^C comes make an
    ImportError of it.
    """
    from yaml import YAMLError

    cause, seen = error.__cause__, set[int]()
    while cause is not None and id(cause) not in seen:  # an error may be its own cause
        if isinstance(cause, KeyboardInterrupt):
            raise cause
        seen.add(id(cause))
        cause = cause.__cause__
    if isinstance(error, OspError):
        return error
    if isinstance(error, YAMLError):
        return _of_yaml(error)
    if (machine := machine_error(error)) is not None:
        return machine
    lightning = sys.modules.get("lightning.fabric.utilities.exceptions")  # only what is loaded can have raised
    if lightning is not None and isinstance(error, lightning.MisconfigurationException):
        return UsageError(f"Lightning refuses the settings of trainer: {_one_line(error, verb)}")
    return _of_hydra(error, verb)


def _of_hydra(error: BaseException, verb: str) -> OspError | None:
    from hydra.errors import HydraException, InstantiationException, OverrideParseException
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        # A constructor raises these about its arguments; anything else is a bug in it.
        about_arguments = (TypeError, ValueError, ImportError)
        return user_error(error.__cause__, verb) or (
            UsageError(_one_line(error, verb)) if isinstance(error.__cause__, about_arguments) else None
        )
    if isinstance(error, MissingMandatoryValue) and error.full_key:
        return UsageError(_missing(str(error.full_key), verb))
    if found := re.search(r"Missing mandatory value: ([\w.]+)", str(error)):  # at the end of a reference
        return UsageError(_missing(found[1], verb))
    if isinstance(error, OverrideParseException):
        return UsageError(
            f"{error.override}: cannot be read ({_one_line(error, verb)}); a text needs quotes, \"'...'\""
        )
    if isinstance(error, HydraException | OmegaConfBaseException):
        if isinstance(error.__cause__, OspError):
            return error.__cause__
        return UsageError(_one_line(error, verb))
    return None


def _of_yaml(error: Exception) -> OspError:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    name = getattr(mark, "name", None) or getattr(error, "name", None) or "a configuration"
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    line = f":{mark.line + 1}" if mark is not None else ""
    file = str(name).strip('"')
    return UsageError(f"{file}{line}: is no YAML ({' '.join(str(problem).split())})")


def _missing(key: str, verb: str) -> str:
    """The message for a setting that has to be given, with its meaning if it has one."""
    configs = config_folder()
    said = meanings(configs / f"{verb}.yaml")
    for group, names in groups_of(verb, configs).items():
        if key.startswith(f"{group}."):
            for name in names:
                said = choice_meanings(configs, group, name) | said
    meaning = f": {said[key]}" if key in said else ""
    return f"{key}=... has to be given{meaning}"


def _one_line(error: BaseException, verb: str) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    # Hydra's hint to append a setting that does not exist is hidden: it would have no effect.
    hidden: tuple[str, ...] = ("Config search path", "provider=")
    hidden += ("full_key:", "object_type=", "reference_type=", "See https", "To append to your", "set HYDRA_FULL_ERROR")
    shown = [line.rstrip(".") for line in lines if line and not line.startswith(hidden)]
    if shown and shown[0].startswith("Could not override"):
        key = shown[0].partition("'")[2].partition("'")[0]
        if verb == "bench" or key.startswith("denoiser."):
            from osp.training.former import new_key  # here: it brings the models

            if (now := new_key(verb, key)) is not None:
                return f"{key} is now called {now}"
        return unknown_key(verb, key, config_folder())
    # A user gives a group in its verb's folder without the folder's name.
    return "; ".join(shown).replace(":;", ":").replace(f"{verb}/target", "target")
