"""Modules of a user's own: imported before anything is built, so that what they register can be chosen by its name."""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from osp.errors import UsageError

VARIABLE = "OSP_IMPORTS"
"""The environment variable with the modules' names, separated by commas, for this process and those that it starts."""


def import_modules(names: Any) -> None:
    """Import modules by their names, here and in the processes that this one starts, also from the current folder.

    Raises UsageError if `names` is neither a name nor a list of names, or if one of them cannot be imported.
    """
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"imports={names}: must be a list of names of modules, as in imports=[my_patterns]")
    if not names:
        return
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    for name in names:
        _import(name)
    os.environ[VARIABLE] = ",".join(dict.fromkeys([*_named(), *names]))


def import_named() -> None:
    """Import the modules that the process which started this one has imported; those that are there cost nothing.

    Registries call this where they do not know a name. Raises UsageError as `import_modules`.
    """
    import_modules(_named())


def _named() -> list[str]:
    return [name for name in os.environ.get(VARIABLE, "").split(",") if name]


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except UsageError:  # what the module registers is refused
        raise
    except ModuleNotFoundError as error:
        missing = f"it imports {error.name}, which is" if error.name and error.name != name else "it is"
        raise UsageError(
            f"imports={name}: {missing} not found; start in the folder that holds {name}.py, or install it"
        ) from error
    except Exception as error:
        raise UsageError(f"imports={name}: importing it fails: {type(error).__name__}: {error}") from error
