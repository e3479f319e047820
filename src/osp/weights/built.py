"""Modules built of settings that a file holds: without memory, no larger than the file, and of the right types only."""

import dataclasses
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from osp.checks import check_choice
from osp.documents import check_form
from osp.errors import DataError, OspError

Built = TypeVar("Built")

MOST = 1 << 20
"""The largest whole number in settings: blocks, channels, sizes."""
_LONGEST = 4096  # list or text
_MORE = 256  # tensors, beyond which a model may have four times those of its file: published ones split ours
_WRONG = (
    *(OspError, TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError),
    *(ArithmeticError, AssertionError, MemoryError),
)


def build_empty(
    make: Callable[..., Built],
    settings: Any,
    tensors: int,
    place: str,
    error: type[OspError] = DataError,
    told: str = "its settings build no",
) -> Built:
    """The object that `make` builds on the meta device from settings, plain values of a file with so many tensors.

    Raises an `error` of one line, which begins with `place` and `told`, for settings that are none, that hold other
    types than those of the model's configuration, or that make a model of many more tensors than the file has.
    """
    try:
        check_form(settings, {}, "settings")
        check_plain(settings, "settings")
        with torch.device("meta"), _at_most(4 * tensors + _MORE):
            built = make(**settings)
        check_types(getattr(built, "config", None), "settings")
    except _WRONG as wrong:
        reason = str(wrong).split("\n")[0][:_LONGEST] or type(wrong).__name__
        raise error(f"{place}: {told} {getattr(make, '__name__', 'model')} ({reason})") from wrong
    return built


def check_plain(settings: Any, place: str, error: type[OspError] = DataError, depth: int = 8) -> None:
    """Raise an `error` unless settings are plain values, none of which is larger than any model's."""
    if depth == 0:
        raise error(f"{place}: has more levels than settings have")
    if isinstance(settings, str | Mapping | Sequence) and len(settings) > _LONGEST:
        raise error(f"{place}: is longer than {_LONGEST}")
    if isinstance(settings, Mapping):
        for key, value in settings.items():
            check_plain(value, f"{place}.{str(key)[:60]}", error, depth - 1)
    elif isinstance(settings, list | tuple):
        for index, value in enumerate(settings):
            check_plain(value, f"{place}[{index}]", error, depth - 1)
    elif isinstance(settings, int) and abs(settings) > MOST:
        raise error(f"{place}: is a number of more than {MOST}, which no model has")
    else:
        try:
            check_form(settings, (str, float, bool, None), place)
        except DataError as wrong:
            raise error(str(wrong)) from wrong


def check_types(config: Any, place: str) -> None:
    """Raise DataError unless the fields of a dataclass hold what they are annotated with; others are not looked at."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return
    hints = get_type_hints(type(config))
    for one in dataclasses.fields(config):
        _check(getattr(config, one.name), hints[one.name], f"{place}.{one.name}")


def _check(value: Any, hint: Any, place: str) -> None:
    origin = get_origin(hint)
    if hint in (int, float, str, bool, type(None)):
        check_form(value, None if hint is type(None) else hint, place)
    elif origin is Literal:
        check_choice(place, value, get_args(hint), DataError)
    elif origin in (tuple, Sequence) and isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _check(inner, get_args(hint)[0], f"{place}[{index}]")
    elif origin in (tuple, Sequence):
        check_form(value, list, place)
    elif origin in (typing.Union, types.UnionType):
        _check_any(value, get_args(hint), place)
    else:
        check_types(value, place)


def _check_any(value: Any, hints: Sequence[Any], place: str) -> None:
    """Check the value as `_check` does, with whichever hint fits it; the error is that of the first hint."""
    first: DataError | None = None
    for hint in hints:
        try:
            return _check(value, hint, place)
        except DataError as error:
            first = first or error
    if first is not None:
        raise first


@contextmanager
def _at_most(tensors: int) -> Iterator[None]:
    """Inside, modules that are built may have so many parameters together; a further one is a ValueError."""
    left = tensors

    def count(_module: nn.Module, _name: str, parameter: nn.Parameter | None) -> None:
        nonlocal left
        left -= parameter is not None
        if left < 0:
            raise ValueError("they make a model of many more tensors than the file holds")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()
