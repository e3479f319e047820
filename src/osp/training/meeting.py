"""The beginning of a run of several processes: until they have met, each looks whether the others are still there.

A process waits for all others when it joins their group, for half an hour if one of them is gone. What has started them
does not always end them then: torchrun does, srun where it is told to, and Lightning's launcher kills the first process
without a word, or is itself in the process that is gone.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import NoReturn, Self

import lightning
from lightning.pytorch.callbacks import Callback

from osp.training.cluster import SlurmStep
from osp.training.endings import SIGNALS
from osp.training.failures import MISSING
from osp.training.heartbeats import FOLDER, STARTING, Beat, Heartbeats, missing

_GRACE = 5.0  # seconds in which a process ends by itself once another one is missing
_PERIOD = 0.5  # seconds between two looks
_TOLD_LATE = 5.0  # seconds for a line of the log, whose lock a thread that hangs may hold
_STARTER = "OSP_FIRST_PROCESS"  # variable with the id of the process that has started this one as one of several
_LAUNCHERS = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT")


class Meeting(Callback):
    """Inside, a process that is killed or fails ends the others on its host, with exit code 1 and one line.

    A signal that asks for the end is heard too: a process that waits for others runs no handlers of Python's.

    A process that a launcher has started as one of several looks from the beginning on; one that starts the others
    itself, from `begin` on. That ends when all have met; then it is up to the watchdog (`osp.training.watchdog`).

    Args:
        folder: of the run; `.ranks-HOST` in it has a small file of each process until they have met.
        nodes: machines of the run.
    """

    def __init__(self, folder: Path, nodes: int = 1) -> None:
        self.folder = folder
        self._beats = Heartbeats(folder, f"{FOLDER}-{socket.gethostname()}")
        self._mine: Beat | None = None  # None: alone, as far as is known
        self._starter = int(os.environ.get(_STARTER, 0))
        self._trainer: lightning.Trainer | None = None  # which has started further processes
        self._processes = 1
        self._over = threading.Event()
        self._pipe: tuple[int, int] | None = None  # of the signals that came: it is read, and Python writes to it
        if (place := _place(nodes, os.environ)) is not None:
            rank, self._processes = place
            self._mine = Beat.here(_start(os.environ), rank)

    def __enter__(self) -> Self:
        """Say that this process is there, if there are others."""
        if self._mine is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._beats.write(self._mine)
            self._look_after_others()
        return self

    def begin(self, trainer: lightning.Trainer) -> None:
        """Look after the processes that this Trainer is about to start, if it does."""
        if self._mine is None and trainer.world_size > 1 and hasattr(trainer.strategy.launcher, "procs"):
            os.environ[_STARTER] = str(os.getpid())
            self._mine, self._processes = Beat.here(_start(os.environ), trainer.global_rank), trainer.world_size
            self._trainer = trainer
            self._look_after_others()

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """All have met, and their watchdog has begun."""
        self._stop()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave word for the others if this process fails, and note at its error if that is because one is gone."""
        mine, looked = self._mine, not self._over.is_set()
        self._stop()
        if mine is None or not looked or error is None or not isinstance(error, Exception):
            return
        if isinstance(error, RuntimeError) and (lost := wait_for(self._missing)) is not None:
            error.add_note(f"{MISSING}{lost_line(lost)}")
        elif self._trainer is None:  # those that this one has started, it ends itself
            self._beats.write(replace(mine, failed=failed_line(error)))

    def _stop(self) -> None:
        if self._pipe is not None and not self._over.is_set():
            signal.set_wakeup_fd(-1)
            os.close(self._pipe[1])
        self._over.set()
        if self._mine is not None:
            self._beats.drop(self._mine.rank)

    def _look_after_others(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._pipe = os.pipe()
            for end in self._pipe:
                os.set_blocking(end, False)
            signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        threading.Thread(target=self._look, name="meeting", daemon=True).start()

    def _look(self) -> None:
        since: float | None = None
        asked = lost = None
        while not self._over.wait(_PERIOD):
            quiet_observer()
            asked, lost = asked or self._asked(), self._missing()
            since = None if asked is None and lost is None else since or time.monotonic()
            if since is not None and time.monotonic() - since > _GRACE:
                self._end(asked, lost)
        if self._pipe is not None:
            os.close(self._pipe[0])

    def _asked(self) -> int | None:
        """The signal that asks this process to end; where it waits for the others, Python's own handlers wait too."""
        came = b""
        if self._pipe is not None:
            with suppress(OSError):  # none came
                came = os.read(self._pipe[0], 64)
        return next((number for number in came if number in SIGNALS), None)

    def _end(self, asked: int | None, lost: Beat | None) -> NoReturn:
        assert self._mine is not None
        line = ""
        if lost is not None:
            line = f"rank {self._mine.rank} of {self._processes} on {self._mine.host}: {lost_line(lost)}"
        if asked is not None:  # all may have been asked, and the first one tells
            told = f"ended by {SIGNALS[signal.Signals(asked)]} before all processes had met"
            line = told if self._mine.rank == 0 else ""
        line = f"{line}; the same command goes on" if line else ""
        end_process(self.folder, line, lambda: end_children(self._trainer, 1.0), 128 + asked if asked else 1)

    def _missing(self) -> Beat | None:
        """A process of this host that is gone or has failed."""
        assert self._mine is not None
        found = {beat.rank: beat for beat in self._family(self._mine)}
        found |= {beat.rank: beat for beat in self._beats.others(self._mine, time.monotonic())}
        return missing(found.values())

    def _family(self, mine: Beat) -> Iterator[Beat]:
        """The process that has started this one, or those that this one has started, which may not have said a word."""
        if self._starter:
            yield replace(mine, rank=mine.rank - int(os.environ["LOCAL_RANK"]), process=self._starter)
        children = [] if self._trainer is None else getattr(self._trainer.strategy.launcher, "procs", [])
        for number, child in enumerate(children, 1):
            yield replace(mine, rank=mine.rank + number, process=child.pid)


def _place(nodes: int, environ: "os._Environ[str]") -> tuple[int, int] | None:
    """The rank of this process, and the number of processes, where something has started it as one of several."""
    step = None if "TORCHELASTIC_RUN_ID" in environ else SlurmStep.of(environ)
    if step is not None and step.has_all_processes:
        return int(environ["SLURM_PROCID"]), step.tasks
    count = int(environ.get("WORLD_SIZE", "1"))
    if count == 1 or "LOCAL_RANK" not in environ:
        return None
    first = int(environ.get("NODE_RANK", "0")) * (count // nodes)
    return int(environ.get("RANK", first + int(environ["LOCAL_RANK"]))), count


def _start(environ: "os._Environ[str]") -> str:
    """A word that the processes of one start have in common on a host, before they know each other."""
    if _STARTER in environ:
        return environ[_STARTER]
    common = [environ.get(key, "") for key in _LAUNCHERS]
    return "/".join([*common, "" if "SLURM_STEP_ID" in environ else str(os.getppid())])


def wait_for(lost: Callable[[], Beat | None], seconds: float = 3.0) -> Beat | None:
    """A process that is missing, whose file may come a moment after the connection to it is lost."""
    limit = time.monotonic() + seconds
    while (found := lost()) is None and time.monotonic() < limit:
        time.sleep(0.1)
    return found


def lost_line(beat: Beat) -> str:
    """The fate of a process that is missing, in words."""
    if beat.failed is not None:
        return f"{beat.place} has failed: {beat.failed}"
    seen = "while it started" if beat.doing == STARTING else f"at step {beat.step}, {beat.doing}"
    return f"{beat.place} is gone; it was last seen {seen}"


def failed_line(error: BaseException) -> str:
    """How a process tells the others of its error."""
    return f"{type(error).__name__}: {error}".split("\n")[0][:300]


def end_process(folder: Path, line: str, end_others: Callable[[], None], code: int = 1) -> NoReturn:
    """End this process and those that it has started; tell the line, in the log of the run too if that can be done."""
    if line:
        os.write(2, f"osp train: {line}\n".encode("utf-8", "backslashreplace"))
        told = threading.Thread(target=_append, args=(folder / "train.log", line), daemon=True)
        told.start()
        told.join(_TOLD_LATE)
    with suppress(Exception):  # whatever state the run is in, it ends
        end_others()
    os._exit(code)


def _append(path: Path, line: str) -> None:
    with suppress(OSError), open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(f"[{time.strftime('%H:%M:%S')}] ERROR {line}\n")


def end_children(trainer: lightning.Trainer | None, seconds: float) -> None:
    """Kill the processes that this one has started and that have not ended by themselves after so many seconds."""
    launcher = None if trainer is None else trainer.strategy.launcher
    if launcher is None:
        return
    limit = time.monotonic() + seconds
    while time.monotonic() < limit and any(one.poll() is None for one in getattr(launcher, "procs", ())):
        time.sleep(0.1)
    launcher.kill(9)


def quiet_observer() -> None:
    """Lightning's own observer would kill the first process without a word, five seconds after another has ended."""
    for thread in threading.enumerate():
        if thread.name == "child-process-observer" and hasattr(thread, "_child_processes"):
            thread._child_processes = []
