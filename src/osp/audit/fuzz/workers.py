"""Cases in forked processes with limits to memory and time, so that a crash or a hang costs one case."""

import contextlib
import faulthandler
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from osp.audit.fuzz.cases import Outcome

_FORK = multiprocessing.get_context("fork")
_PAGE = resource.getpagesize()
_TICKS = os.sysconf("SC_CLK_TCK")
_WAITING = 8  # times as long as a case may compute it may take: other processes share the cores
_POLL = 0.5  # seconds


@dataclass(frozen=True)
class Bounds:
    """The limits of one case: memory above that of the process it begins in, and seconds of computing."""

    mebibytes: int = 3072
    seconds: float = 20.0


def run_all(
    run: Callable[[int], Outcome], numbers: Iterator[int], bounds: Bounds, log: Path
) -> Iterator[tuple[int, Outcome]]:
    """(number, outcome) of each case; one that ends its process is a crash, one beyond the time a hang.

    What the processes write, and where a crash happened, goes to the file `log`.
    """
    worker: _Worker | None = None
    for number in numbers:
        if worker is None:
            worker = _Worker(run, bounds, log)
        outcome = worker.outcome(number)
        if outcome.state in ("crash", "hang"):
            worker.end()
            worker = None
        yield number, outcome
    if worker is not None:
        worker.end()


class _Worker:
    """One forked process that runs the cases that it is told."""

    def __init__(self, run: Callable[[int], Outcome], bounds: Bounds, log: Path) -> None:
        self.bounds, self.log = bounds, log
        self.mine, theirs = _FORK.Pipe()
        self.process = _FORK.Process(target=_work, args=(run, theirs, bounds, log), daemon=True)
        self.process.start()
        theirs.close()

    def outcome(self, number: int) -> Outcome:
        """The outcome of one case."""
        before, begun = _computed(self.process.pid), time.monotonic()
        self.log.write_bytes(b"")
        with contextlib.suppress(BrokenPipeError):  # told below
            self.mine.send(number)
        while not self.mine.poll(_POLL):
            took = _computed(self.process.pid) - before
            if took > self.bounds.seconds or time.monotonic() - begun > _WAITING * self.bounds.seconds:
                return Outcome("hang", "", f"no end after {took:.0f} s of computing")
        try:
            outcome: Outcome = self.mine.recv()
        except EOFError:
            self.process.join()
            return Outcome("crash", "", f"exit code {self.process.exitcode}\n{self.log.read_text(errors='replace')}")
        return outcome

    def end(self) -> None:
        """Kill the process."""
        if self.process.is_alive():
            self.process.kill()
        self.process.join()
        self.mine.close()


def _work(run: Callable[[int], Outcome], pipe: Connection, bounds: Bounds, log: Path) -> None:
    """In the process: a case for each number that comes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        faulthandler.enable(file)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * _PAGE
        limit = used + (bounds.mebibytes << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(EOFError):
            while True:
                pipe.send(run(pipe.recv()))


def _computed(pid: int | None) -> float:
    """Seconds that a process has computed; 0 if it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS
