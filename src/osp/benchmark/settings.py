"""How the settings of a benchmark are read: what may be one value or a list, checked before anything is measured."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from osp.checks import check_choice, check_number
from osp.errors import UsageError


def listed(settings: Mapping[str, Any], key: str) -> list[Any]:
    """The values of a list, each once, or the only one. Raises UsageError if there is none."""
    value = settings[key]
    values = value if isinstance(value, list) else [value]
    if not values:
        raise UsageError(f"{key}=[]: leaves nothing to measure; give at least one value")
    return [one for i, one in enumerate(values) if one not in values[:i]]


def choices(settings: Mapping[str, Any], key: str, known: Sequence[Any]) -> list[Any]:
    """The values of a list. Raises UsageError naming one that is not known."""
    values = listed(settings, key)
    for value in values:
        check_choice(key, value, known)
    return values


def whole_numbers(settings: Mapping[str, Any], key: str, least: int = 1, null: str = "") -> list[Any]:
    """The values of a list. Raises UsageError for one that is no whole number of at least so much.

    `null` says what None means where it is allowed.
    """
    values = listed(settings, key)
    for value in values:
        check_number(key, value, least, whole=True, null=null)
    return values


def sizes(settings: Mapping[str, Any], key: str, form: str, example: str) -> list[tuple[int, ...]]:
    """`16x24` -> 16 and 24, of each value of a list. Raises UsageError for another form than such as HEIGHTxWIDTH."""
    return [_sides(key, value, form, example) for value in listed(settings, key)]


def _sides(key: str, value: Any, form: str, example: str) -> tuple[int, ...]:
    parts = str(value).split("x")
    if len(parts) != len(form.split("x")) or not all(re.fullmatch(r"0*[1-9][0-9]*", part) for part in parts):
        raise UsageError(f"{key}={value}: must be {form}, for example {example}")
    return tuple(map(int, parts))
