"""Cases: which subject is damaged how, by seed, kind and number; and what came of it."""

import io
import logging
import shutil
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from osp.audit.fuzz import media, models, stored, texts
from osp.audit.fuzz.subject import Reading, Subject, damage, fresh_copy, told_of
from osp.errors import OspError

KINDS: Mapping[str, Sequence[Subject]] = {
    "media": media.SUBJECTS,
    "tars": stored.TARS,
    "listings": stored.LISTINGS,
    "texts": texts.SUBJECTS,
    "configs": texts.CONFIGS,
    "weights": models.SUBJECTS,
}

STATES = ("refused", "same", "different", "traceback", "crash", "hang")
FAULTS = frozenset({"traceback", "crash", "hang"})


@dataclass(frozen=True)
class Outcome:
    """The outcome of a case: its state (one of STATES), the file that was changed, and the reason."""

    state: str
    what: str
    detail: str = ""


class StrictLog(logging.Handler):
    """Formats every record as a file would, and keeps what went wrong with that: a log line that is a traceback."""

    def __init__(self) -> None:
        super().__init__()
        self.broken = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Format the record."""
        try:
            io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace").write(self.format(record))
        except Exception:  # noqa: BLE001  (whatever it is, it is a fault to tell)
            self.broken = traceback.format_exc()


class Originals:
    """The valid files of all subjects of a kind, made once, and what is read of them.

    Args:
        folder: where they lie.
        subjects: of the kind.
        told: the line that a user is shown of an error, or None for a bug.
    """

    def __init__(
        self,
        folder: Path,
        subjects: Sequence[Subject],
        told: Callable[[BaseException], OspError | None] = told_of,
    ) -> None:
        self.folder, self.subjects, self.told = folder, subjects, told
        self.read: dict[str, list[str]] = {}
        self._turns = [subject for subject in subjects for _ in range(subject.weight)]
        self._log = StrictLog()

    def make(self) -> None:
        """Write the files of all subjects and read them; raises what a subject raises that reads itself wrongly."""
        logging.getLogger("osp").addHandler(logging.NullHandler())  # what is passed over is told again and again
        for subject in self.subjects:
            place = self.folder / "originals" / subject.name
            place.mkdir(parents=True)
            subject.make(place)
            first, second = (self._reading(subject, fresh_copy(place, self.work)) for _ in range(2))
            self.read[subject.name] = first.parts
            if first.parts != second.parts:
                raise OspError(f"{subject.name}: is read differently each time")

    @property
    def work(self) -> Path:
        """Where a case's files lie while it runs."""
        return self.folder / "work"

    def _reading(self, subject: Subject, place: Path) -> Reading:
        reading = Reading(self.told)
        subject.read(place, reading)
        return reading

    def damaged(self, seed: str) -> tuple[Subject, Path, str]:
        """The subject of a case, a folder with its damaged files, and the name of the one that was changed."""
        draw = Random(seed)
        subject = draw.choice(self._turns)
        place = fresh_copy(self.folder / "originals" / subject.name, self.work)
        path = damage(draw, subject, place)
        return subject, place, f"{subject.name}/{path.relative_to(place)}"

    def run(self, seed: str, keep: Path | None = None) -> Outcome:
        """The outcome of a case in this process; the files of one that is a fault are kept in `keep`."""
        subject, place, what = self.damaged(seed)
        if keep is not None:  # now, as a crash leaves no time for it, and a reader may write
            _copy(place, keep)
        outcome = self.judged(subject, place, what)
        if keep is not None and outcome.state not in FAULTS:
            shutil.rmtree(keep, ignore_errors=True)
        return outcome

    def judged(self, subject: Subject, place: Path, what: str) -> Outcome:
        """The outcome of reading files that were changed."""
        self._log.broken = ""
        root = logging.getLogger()
        root.addHandler(self._log)
        try:
            reading = self._reading(subject, place)
        except Exception:  # noqa: BLE001  (any of them is what is looked for)
            return Outcome("traceback", what, traceback.format_exc())
        finally:
            root.removeHandler(self._log)
        if self._log.broken:
            return Outcome("traceback", what, self._log.broken)
        if reading.parts == self.read[subject.name]:
            return Outcome("same", what)
        return Outcome("refused", what, reading.refused[-1]) if reading.refused else Outcome("different", what)


def _copy(place: Path, keep: Path) -> None:
    shutil.rmtree(keep, ignore_errors=True)
    keep.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(place, keep, symlinks=True)
