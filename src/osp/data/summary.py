"""Summaries of many files: the clips that are taken, those left out and why, and how many have a caption.

Every verb that reads a folder ends with the `Summary` of what it read, so that nothing is left out in silence.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from osp.documents import printable

log = logging.getLogger(__name__)

_EXAMPLES = 5  # named in a line
_LONGEST = 300  # characters of an example


@dataclass(frozen=True)
class Summary:
    """The counts of what was read of one place.

    Args:
        place: the folder, or what else the clips come from.
        clips: how many are taken.
        left_out: how many files or clips are left out, by a reason that reads on after the number ("clips that are too
            short", ".heic files").
        captioned: clips with a caption; None: only reading them tells.
    """

    place: str
    clips: int
    left_out: Mapping[str, int] = field(default_factory=dict)
    captioned: int | None = None

    def line(self) -> str:
        """All of it for people, in one line."""
        parts = [f"{self.clips} {_clips(self.clips)}"]
        if self.captioned is not None and self.captioned < self.clips:
            parts = [*([] if self.clips == 1 else parts), _uncaptioned(self.clips - self.captioned, self.clips)]
        elif self.captioned:
            parts[0] += ", with a caption" if self.clips == 1 else ", all with captions"
        if left_out := [f"{count} {reason}" for reason, count in self.left_out.items() if count]:
            parts.append(f"left out: {', '.join(left_out)}")
        return printable(f"{self.place}: {'; '.join(parts)}")

    def log(self) -> None:
        """Log the line; as a warning where something is left out or clips have no caption."""
        incomplete = any(self.left_out.values()) or (self.captioned is not None and self.captioned < self.clips)
        log.log(logging.WARNING if incomplete else logging.INFO, "%s", self.line())

    def as_json(self) -> dict[str, Any]:
        """Plain values, for the result of a verb."""
        return {"clips": self.clips, "captioned": self.captioned, "left_out": dict(self.left_out)}


class Tally:
    """Counts of what is passed over, by reason, with the first few as examples."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._examples: dict[str, list[str]] = {}

    def add(self, reason: str, example: object) -> None:
        """Count one more for a reason that reads on after the number ("side-cars that cannot be read")."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        examples = self._examples.setdefault(reason, [])
        if len(examples) < _EXAMPLES:
            examples.append(printable(str(example)[:_LONGEST]))

    def count(self, reason: str) -> None:
        """Count one more for a reason that is told in a `Summary` alone, not by `warn`."""
        self.counts[reason] = self.counts.get(reason, 0) + 1

    def take(self, other: "Tally") -> None:
        """Take over what another one has counted of other reasons."""
        self.counts |= other.counts
        self._examples |= other._examples

    def warn(self, place: object) -> None:
        """Log one line a reason, such as "PLACE: 2 side-cars that cannot be read: a.json: is no JSON; b.txt: ..."."""
        for reason, shown in self._examples.items():
            count = self.counts[reason]
            more = f"; and {count - len(shown)} more" if count > len(shown) else ""
            log.warning("%s: %d %s: %s%s", printable(place), count, reason, "; ".join(shown), more)


def _uncaptioned(missing: int, clips: int) -> str:
    if missing < clips:
        return f"{missing} of {clips} clips {'has' if missing == 1 else 'have'} no caption"
    return "1 clip without a caption" if clips == 1 else "none has a caption"


def _clips(count: int) -> str:
    return "clip" if count == 1 else "clips"
