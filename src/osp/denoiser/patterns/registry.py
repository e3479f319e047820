"""The registry of attention patterns: the names that stages have in Python and in configurations."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from osp.checks import check_choice
from osp.denoiser.patterns.arrangement import (
    Dense,
    GroupSkip,
    GroupSkip2D,
    Pattern,
    SingleSkip,
    SingleSkip2D,
    Spatial,
    Temporal,
    Window,
)
from osp.errors import UsageError
from osp.extensions import import_named

MakePatterns = Callable[..., Pattern | Sequence[Pattern]]


@dataclass(frozen=True)
class _Entry:
    make: MakePatterns
    is_sparse: bool


_ENTRIES: dict[str, _Entry] = {}


def register_pattern(name: str, make: MakePatterns) -> None:
    """Give patterns a name, which `pattern` of a stage then takes.

    `make` gives one pattern, or several that the blocks of a stage take in turn: for a sparsity `k`, its only argument,
    or for none. A class of patterns is such a function. A module that is run again may register its own name again.

    Raises UsageError for a name that is taken, and for a function of other arguments.
    """
    known = _ENTRIES.get(name)
    if known is not None and _place(known.make) != _place(make):
        raise UsageError(f"register_pattern: there is another pattern {name}; choose another name")
    arguments = len(inspect.signature(make).parameters)
    if arguments > 1:
        raise UsageError(
            f"register_pattern: {name} takes {arguments} arguments; it may take the sparsity k, or nothing"
        )
    _ENTRIES[name] = _Entry(make, arguments == 1)


def pattern_names() -> list[str]:
    """All names that a stage's `pattern` may have."""
    return list(_ENTRIES)


def check_pattern(name: str, k: int) -> None:
    """Raise UsageError for a name that nobody has registered, and for a sparsity of patterns that have none."""
    if name not in pattern_names():
        import_named()
    check_choice("stages: pattern", name, pattern_names())
    if k != 1 and not _ENTRIES[name].is_sparse:
        raise UsageError(f"stages: pattern={name} has no sparsity; k={k} must be left out")


def make_patterns(name: str, k: int) -> tuple[Pattern, ...]:
    """The patterns that the blocks of a stage take in turn. Raises UsageError as `check_pattern`."""
    check_pattern(name, k)
    entry = _ENTRIES[name]
    made = entry.make(k) if entry.is_sparse else entry.make()
    patterns = (made,) if isinstance(made, Pattern) else tuple(made)
    if not patterns or not all(isinstance(pattern, Pattern) for pattern in patterns):
        raise UsageError(f"stages: pattern={name} gives {made!r}; it must give patterns, of classes below Pattern")
    return patterns


def _place(make: MakePatterns) -> tuple[str | None, str | None]:
    return getattr(make, "__module__", None), getattr(make, "__qualname__", None)


def _skiparse(k: int) -> Sequence[Pattern]:
    return (SingleSkip(k), GroupSkip(k)) if k > 1 else (Dense(),)


def _skiparse_2d(k: int) -> Sequence[Pattern]:
    return (SingleSkip2D(k), GroupSkip2D(k)) if k > 1 else (Dense(),)


def _skip_window(k: int) -> Sequence[Pattern]:
    return SingleSkip(k), Window(k)


def _two_plus_one() -> Sequence[Pattern]:
    return Spatial(), Temporal()


register_pattern("dense", Dense)
register_pattern("2+1d", _two_plus_one)
register_pattern("skiparse", _skiparse)
register_pattern("skiparse_2d", _skiparse_2d)
register_pattern("skip_window", _skip_window)
