"""The one wording of a refused number or choice: key, value, limit."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from osp.errors import NotFiniteError, OspError, UsageError


def check_number(
    key: str,
    value: Any,
    least: float | None = None,
    most: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
    whole: bool = False,
    null: str = "",
    error: type[OspError] = UsageError,
) -> None:
    """Raise an error naming key, value and limits unless `value` is a finite number within them, a whole one if asked.

    `least` and `most` are allowed themselves, `above` and `below` are not. `null` says what None means, where it is
    allowed: "the model's own".
    """
    if value is None and null:
        return
    limits = (
        (least, lambda: value >= least),
        (most, lambda: value <= most),
        (above, lambda: value > above),
        (below, lambda: value < below),
    )
    # Whole numbers are finite; `isfinite` would fail on very large ones.
    is_number = isinstance(value, int) or (not whole and isinstance(value, float) and math.isfinite(value))
    fits = is_number and not isinstance(value, bool)
    if not fits or not all(within() for limit, within in limits if limit is not None):
        otherwise = f", or null: {null}" if null else ""
        raise error(f"{key}={_shown(value)}: must {_limits(least, most, above, below, whole)}{otherwise}")


def check_choice(key: str, value: Any, choices: Iterable[Any], error: type[OspError] = UsageError) -> None:
    """Raise an error naming key, value and all choices unless `value` is one of them."""
    known = [*choices]
    if value not in known:
        *others, last = map(_shown, known)
        listed = f"{', '.join(others)} or {last}" if others else last
        raise error(f"{key}={_shown(value)}: is not known; choose {listed}")


def is_finite(values: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; one without memory does not."""
    if values.is_meta or not (values.is_floating_point() or values.is_complex()):
        return True
    if values.dtype.itemsize == 1:  # torch has no sums of these
        values = values.float()
    # The sum of numbers that are finite is finite, unless it is too large; it needs no memory.
    total = values.sum(dtype=torch.float32 if values.dtype == torch.float16 else None)
    return bool(total.isfinite()) or bool(values.isfinite().all())


def check_finite(what: str, values: Tensor) -> None:
    """Raise NotFiniteError naming `what` if a tensor holds NaN or infinity."""
    if not is_finite(values):
        raise NotFiniteError(
            f"{what} are not finite (NaN or infinity); the weights are broken, or too large for their precision: try "
            "float32, or other weights"
        )


def _shown(value: Any) -> str:
    """A value as it is written in a command."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _limits(least: float | None, most: float | None, above: float | None, below: float | None, whole: bool) -> str:
    kind = "whole number" if whole else "number"
    if least is not None and most is not None and not whole:
        return f"lie between {_limit(least)} and {_limit(most)}"
    limits = (("of at least", least), ("of at most", most), ("above", above), ("below", below))
    parts = [f"{which} {_limit(limit)}" for which, limit in limits if limit is not None]
    return f"be a {kind} {' and '.join(parts)}".rstrip()


def _limit(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"
