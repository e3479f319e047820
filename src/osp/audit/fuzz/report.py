"""Lines that say what came of many cases."""

from collections import Counter
from dataclasses import dataclass, field

from osp.audit.fuzz.cases import FAULTS, STATES, Outcome
from osp.documents import printable


@dataclass
class Tally:
    """How many cases of a kind came to what, and the faults by their reason."""

    kind: str
    states: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: Outcome, faults: frozenset[str] = FAULTS) -> str | None:
        """Count an outcome; gives the reason of a fault that is the first of its place and kind of error."""
        self.states[outcome.state] += 1
        if outcome.state not in faults:
            return None
        place, message = reason(outcome)
        self.reasons[place] += 1
        return f"{place}: {message}" if self.reasons[place] == 1 else None

    def __str__(self) -> str:
        counts = ", ".join(f"{self.states[state]} {state}" for state in STATES)
        return f"{self.kind:<20} {self.states.total()} tried: {counts}"


def reason(outcome: Outcome) -> tuple[str, str]:
    """The state of a fault with the place in our code and the kind of error, and its message."""
    lines = outcome.detail.strip().splitlines() or [""]
    places = [line.split('"')[1:3] for line in lines if line.lstrip().startswith('File "')]
    ours = [f"{path.rpartition('/osp/')[2]}:{line.strip(', ')}" for path, line in places if "/osp/" in path]
    last = next((line for line in reversed(lines) if line and not line.startswith(" ")), "")
    kind, _, message = last.partition(": ")
    place = f"at {ours[-1]}: {kind}" if ours else f"in {outcome.what}"
    return printable(f"{outcome.state} {place}"), printable(message)[:160]
