"""The answers to the questions to a machine: one line each, and all of them as plain values."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

State = Literal["passed", "warning", "failed", "not applicable"]
STATES: tuple[State, ...] = ("passed", "warning", "failed", "not applicable")


@dataclass(frozen=True)
class Result:
    """One answer.

    Args:
        name: the check, a dot, and what of it: `attention.padded`.
        detail: figures, or the reason.
        mend: what to do about a failure or a warning.
        device: where it was asked, if the answers of devices may differ.
        measured: the numbers behind the detail.
    """

    name: str
    state: State
    detail: str
    mend: str = ""
    device: str = ""
    measured: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        where = f" on {self.device}" if self.device else ""
        mend = f"; {self.mend}" if self.mend else ""
        return f"{self.state:<14} {self.name}{where}: {self.detail}{mend}"

    def plain(self) -> dict[str, Any]:
        """The answer as plain values; every answer has the same keys."""
        names = ("name", "state", "detail", "mend", "device", "measured")
        return {name: getattr(self, name) for name in names}


def passed(name: str, detail: str, **others: Any) -> Result:
    """An answer without anything to mend."""
    return Result(name, "passed", detail, **others)


def failed(name: str, detail: str, mend: str, **others: Any) -> Result:
    """An answer that has to be mended first."""
    return Result(name, "failed", detail, mend, **others)


def warning(name: str, detail: str, mend: str, **others: Any) -> Result:
    """An answer that costs time, or does so later."""
    return Result(name, "warning", detail, mend, **others)


def not_applicable(name: str, reason: str, **others: Any) -> Result:
    """The answer where the question makes no sense."""
    return Result(name, "not applicable", reason, **others)


def counts(results: Iterable[Result]) -> dict[str, int]:
    """How many answers there are of each state; `not_applicable` is one word here."""
    states = [result.state for result in results]
    return {state.replace(" ", "_"): states.count(state) for state in STATES}


def summary(results: Sequence[Result]) -> str:
    """How many answers there are of each state, in one line."""
    return ", ".join(f"{number} {state.replace('_', ' ')}" for state, number in counts(results).items())
