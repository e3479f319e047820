"""Where each process of a run is, in small files in the run's folder, so that the others can tell which one is missing.

Files work without torch.distributed, and also where a process is gone or hangs. They are written by a thread beside the
training (`osp.training.watchdog`).
"""

import json
import os
import socket
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

FOLDER = ".ranks"
STARTING = "starting"
"""What a process does before its first phase."""


@dataclass(frozen=True)
class Beat:
    """The place of one process.

    Args:
        start: what all processes of one start of the run have in common.
        moves: phases begun since the start; the processes of a run go through the same ones.
        step: of the optimiser.
        doing: the phase, in words.
        idle: seconds since the process has moved.
        waits: whether it stands in an exchange with the others.
        failed: how it has failed; None: it has not.
    """

    start: str
    rank: int
    host: str
    process: int
    moves: int = 0
    step: int = 0
    doing: str = STARTING
    idle: float = 0.0
    waits: bool = False
    failed: str | None = None

    @classmethod
    def here(cls, start: str, rank: int) -> "Beat":
        """The first one of this process."""
        return cls(start, rank, socket.gethostname(), os.getpid())

    @property
    def place(self) -> str:
        """Rank, host and process."""
        return f"rank {self.rank} (host {self.host}, process {self.process})"

    @property
    def where(self) -> str:
        """Rank, host and process, its step and its phase."""
        return f"{self.place} at step {self.step}, {self.doing}"


class Heartbeats:
    """The files of all processes, in a folder in that of the run."""

    def __init__(self, folder: Path, name: str = FOLDER) -> None:
        self.folder = folder / name
        self._seen: dict[int, tuple[Beat, float]] = {}

    def write(self, beat: Beat) -> None:
        """Write this process's file; a folder that cannot be written costs the file alone."""
        path = self.folder / f"{beat.rank}.json"
        part = path.with_suffix(f".{os.getpid()}.part")
        with suppress(OSError):
            self.folder.mkdir(exist_ok=True)
            part.write_text(json.dumps(asdict(beat)))
            os.replace(part, path)

    def drop(self, rank: int) -> None:
        """Take the file of a process away that has ended well, and the folder with the last one."""
        with suppress(OSError):
            (self.folder / f"{rank}.json").unlink(missing_ok=True)
            self.folder.rmdir()

    def others(self, mine: Beat, now: float) -> list[Beat]:
        """The last beats of the other processes of the same start, by rank.

        `idle` counts on where a file does not change any more; `now` is this process's clock, as those of other hosts
        may differ.
        """
        found = []
        for beat in _read(self.folder.glob("*.json")):
            if beat.start != mine.start or beat.rank == mine.rank:
                continue
            before, since = self._seen.get(beat.rank, (None, now))
            if before != beat:
                since = now
                self._seen[beat.rank] = beat, now
            found.append(replace(beat, idle=beat.idle + now - since))
        return sorted(found, key=lambda beat: beat.rank)

    def silence(self, rank: int, now: float) -> float:
        """Seconds since the file of another process has changed, as far as `others` has seen."""
        return now - self._seen[rank][1] if rank in self._seen else 0.0

    def clear(self, start: str) -> None:
        """Take the files of earlier starts away."""
        for path in self.folder.glob("*.json"):
            if not any(beat.start == start for beat in _read([path])):
                path.unlink(missing_ok=True)


def is_gone(beat: Beat) -> bool:
    """Whether a process of this host is no more; False where that is not known."""
    if beat.host != socket.gethostname():
        return False
    try:
        if sys.platform == "linux":  # a process that nobody has waited for yet is there, as a zombie
            return Path(f"/proc/{beat.process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        os.kill(beat.process, 0)
    except (ProcessLookupError, FileNotFoundError):
        return True
    except OSError:
        return False
    return False


def missing(beats: Iterable[Beat]) -> Beat | None:
    """The process that has failed or is gone; None if there is none. One that is gone hides how the others failed."""
    gone = [beat for beat in beats if beat.failed is not None or is_gone(beat)]
    return min(gone, key=lambda beat: (beat.failed is not None, beat.rank), default=None)


def behind(beats: Iterable[Beat]) -> list[Beat]:
    """Those that all others wait for: the least far, and of these the ones that do not wait for others themselves."""
    all_beats = list(beats)
    least = min(beat.moves for beat in all_beats)
    last = [beat for beat in all_beats if beat.moves == least]
    return [beat for beat in last if not beat.waits] or last


def _read(paths: Iterable[Path]) -> list[Beat]:
    """The beats in files; what is no beat is left out."""
    beats = []
    for path in paths:
        with suppress(OSError, ValueError, TypeError):
            beats.append(Beat(**json.loads(path.read_text())))
    return beats
