"""A thread beside the training that ends a run in which nothing moves, and names the process that all wait for."""

import os
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import lightning
from lightning.pytorch.callbacks import Callback

from osp.checks import check_number
from osp.training.endings import Ended
from osp.training.failures import MISSING, PLACE
from osp.training.heartbeats import Beat, Heartbeats, behind, missing
from osp.training.meeting import (
    end_children,
    end_process,
    failed_line,
    lost_line,
    quiet_observer,
    wait_for,
)

_GRACE = 10.0  # seconds in which a process ends by itself once another one is missing
_LINGER = 5.0  # seconds that the others of a run that hangs leave the first one to tell why
_TOLD_LATE = 5.0  # seconds more, in which that one writes into a log whose lock a thread that hangs may hold
_PERIODS = (0.2, 5.0)  # seconds between two looks, at least and at most
_LONG = ("in a validation", "saving a checkpoint")  # phases whose progress is seen by the stack alone
_READING = "reading clips"


class Watchdog(Callback):
    """Ends the run with exit code 1 and one line if no process of it has moved for `limit` seconds.

    The line names the process that all wait for, its host, its step and what it was doing, and where its Python stack
    is written. A process that dies is noticed within seconds by the others on its host.

    Moving is: a phase of a step begins or ends, a batch is read, a batch of a validation is done. In validations, while
    a checkpoint is written, and before the first step has ended (models are compiled then), the Python stack of the
    training thread moving is enough. Before the training begins nothing is limited.

    Args:
        folder: of the run; `.ranks` in it has a small file of each process.
        limit: None: nothing is watched.

    Raises UsageError for a limit that is not above 0.
    """

    def __init__(self, folder: str | Path, limit: float | None = 1200.0) -> None:
        check_number("watchdog", limit, above=0, null="never")
        self.folder, self.limit = Path(folder), limit
        self.beats = Heartbeats(self.folder)
        self._beat: Beat | None = None
        self._moved = time.monotonic()
        self._stepped = self._running = False
        self._stack: tuple[Any, ...] = ()
        self._over, self._lock = threading.Event(), threading.Lock()
        self._others_end: Callable[[float], None] = lambda seconds: None
        self._ending = False
        self._missing_since: float | None = None
        self._world = 1

    # --- what the training does -----------------------------------------------------------------------------------

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Start watching; the processes know each other by now."""
        if self.limit is None or stage != "fit":
            return
        start = str(trainer.strategy.broadcast(uuid.uuid4().hex))
        self._beat, self._world = Beat.here(start, trainer.global_rank), trainer.world_size
        self._others_end = lambda seconds: end_children(trainer, seconds)
        quiet_observer()
        self._stack_file(trainer.global_rank).unlink(missing_ok=True)  # of an earlier start
        if trainer.is_global_zero:
            self.beats.clear(start)
        self.beats.write(self._beat)
        data = trainer.datamodule  # type: ignore[attr-defined]
        data.waiting = self._reading(data.waiting)
        self._over.clear()
        self._thread = threading.current_thread()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def move(self, trainer: lightning.Trainer, doing: str) -> None:
        """The training begins something else."""
        if self._beat is not None:
            self._beat = replace(self._beat, moves=self._beat.moves + 1, step=trainer.global_step, doing=doing)
            self._moved = time.monotonic()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """From here on the limit counts."""
        self._running = True
        self.move(trainer, "before its first step")

    def on_train_batch_start(self, trainer: lightning.Trainer, *args: Any, **kwargs: Any) -> None:
        """A step begins."""
        self.move(trainer, "in the forward pass")

    def on_before_backward(self, trainer: lightning.Trainer, *args: Any, **kwargs: Any) -> None:
        """The gradients are computed."""
        self.move(trainer, "in the backward pass")

    def on_after_backward(self, trainer: lightning.Trainer, *args: Any, **kwargs: Any) -> None:
        """They are there."""
        self.move(trainer, "after a backward pass")

    def on_before_optimizer_step(self, trainer: lightning.Trainer, *args: Any, **kwargs: Any) -> None:
        """Weights are changed."""
        self.move(trainer, "in the step of an optimiser")

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any, **kwargs: Any) -> None:
        """A step is over."""
        self._stepped = True
        self.move(trainer, "after a step")

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """A validation begins."""
        self.move(trainer, "in a validation")

    def on_validation_batch_start(self, trainer: lightning.Trainer, *args: Any, **kwargs: Any) -> None:
        """It has clips."""
        self.move(trainer, "in a validation")

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """It is over."""
        self.move(trainer, "after a validation")

    def on_save_checkpoint(self, trainer: lightning.Trainer, *args: Any, **kwargs: Any) -> None:
        """A checkpoint is written."""
        self.move(trainer, "saving a checkpoint")

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """The run is over."""
        self._stop()

    def on_exception(self, trainer: lightning.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Note at the exception which process it is of, and which one is missing if that is why."""
        if self._ending:  # one of those that the thread ends is gone already
            time.sleep(_LINGER + _TOLD_LATE)
        several = trainer.world_size > 1
        if several:
            place = f"rank {trainer.global_rank} of {trainer.world_size} on {socket.gethostname()}"
            exception.add_note(f"{PLACE}{place}")
        beat = self._beat
        self._stop()
        if beat is None or not several or isinstance(exception, Ended | KeyboardInterrupt):
            return
        if isinstance(exception, RuntimeError) and (lost := wait_for(lambda: self._missing(beat))) is not None:
            exception.add_note(f"{MISSING}{lost_line(lost)}")
            return
        self.beats.write(replace(beat, failed=failed_line(exception)))

    # --- what the thread does -------------------------------------------------------------------------------------

    def _watch(self) -> None:
        assert self.limit is not None
        period = min(max(self.limit / 20, _PERIODS[0]), _PERIODS[1])
        slept = time.monotonic()
        while not self._over.wait(period):
            if time.monotonic() - slept > 10 * period:
                self._moved = time.monotonic()  # the process was stopped, as by ^Z, and goes on
            slept = time.monotonic()
            with self._lock:
                if (beat := self._look()) is None:
                    return
                self.beats.write(beat)
            others = self.beats.others(beat, time.monotonic())
            self._end_if_missing(others)
            if self._running and all(one.idle > self.limit for one in (beat, *others)):
                self._end_hanging(beat, period)

    def _look(self) -> Beat | None:
        """This process's beat as it is now; None at the end."""
        if (beat := self._beat) is None:
            return None
        frame = sys._current_frames().get(self._thread.ident or 0)
        stack = _stack_of(frame)
        if stack != self._stack and (beat.doing in _LONG or (not self._stepped and beat.doing != _READING)):
            self._moved = time.monotonic()
        self._stack = stack
        return replace(beat, idle=time.monotonic() - self._moved, waits=_waits(frame))

    def _end_if_missing(self, others: list[Beat]) -> None:
        lost = missing(others)
        if lost is None:
            self._missing_since = None
            return
        self._missing_since = self._missing_since or time.monotonic()
        if time.monotonic() - self._missing_since > _GRACE:
            self._end(f"{self._name()}: {lost_line(lost)}")

    def _end_hanging(self, mine: Beat, period: float) -> None:
        """Write this process's stack, tell the line if it is the first one that still can, and end."""
        self.beats.write(mine)
        self._write_stack(mine)
        self._ending = True
        self._over.wait(3 * period)  # until all have written theirs
        if self._over.is_set():
            return
        others = self.beats.others(mine, time.monotonic())
        # Those before it may be frozen as a whole.
        if any(one.rank < mine.rank and self.beats.silence(one.rank, time.monotonic()) < 10 * period for one in others):
            time.sleep(_LINGER)
            os._exit(1)
        slow = behind([mine, *others])
        more = f" and {len(slow) - 1} more" if len(slow) > 1 else ""
        waits = f"all {self._world} processes wait for " if len(slow) < self._world and self._world > 1 else ""
        assert self.limit is not None
        file = self._stack_file(slow[0].rank)
        stack = f"its stack is in {file}" if file.exists() else "it is frozen, and wrote no stack"
        self._end(
            f"nothing has moved for {self.limit:g} s (watchdog): {waits}{slow[0].where}{more}; {stack}, and the same "
            "command goes on from the last checkpoint",
            leave=0.0,
        )

    def _end(self, line: str, leave: float = 3.0) -> NoReturn:
        """End this process with the line; those that it has started have so many seconds to end by themselves."""
        end_process(self.folder, line, lambda: self._others_end(leave))

    def _write_stack(self, beat: Beat) -> None:
        frame = sys._current_frames().get(self._thread.ident or 0)
        lines = traceback.format_stack(frame) if frame is not None else []
        with suppress(OSError):
            self._stack_file(beat.rank).write_text(f"{beat.where}\n{''.join(lines)}")

    def _stack_file(self, rank: int) -> Path:
        return self.folder / f"hung_rank_{rank}.txt"

    def _missing(self, mine: Beat) -> Beat | None:
        return missing(self.beats.others(mine, time.monotonic()))

    @contextmanager
    def _waiting(self, inner: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
        beat = self._beat
        if beat is not None:
            self._beat, self._moved = replace(beat, moves=beat.moves + 1, doing=_READING), time.monotonic()
        with inner():
            yield
        if self._beat is not None and beat is not None:
            moves = self._beat.moves + 1
            self._beat, self._moved = replace(self._beat, moves=moves, doing=beat.doing), time.monotonic()

    def _reading(self, inner: Callable[[], AbstractContextManager[Any]]) -> Callable[[], AbstractContextManager[Any]]:
        return lambda: self._waiting(inner)

    def _name(self) -> str:
        assert self._beat is not None
        return f"rank {self._beat.rank} of {self._world} on {self._beat.host}"

    def _stop(self) -> None:
        self._over.set()
        with self._lock:
            if self._beat is not None:
                self.beats.drop(self._beat.rank)
                self._beat = None


def _stack_of(frame: FrameType | None) -> tuple[Any, ...]:
    """Where a thread stands, to compare with later."""
    found = []
    while frame is not None:
        found.append((id(frame.f_code), frame.f_lasti))
        frame = frame.f_back
    return tuple(found)


def _waits(frame: FrameType | None) -> bool:
    """Whether a thread stands in an exchange with other processes, as far as Python knows."""
    for _ in range(4):
        if frame is None:
            return False
        if os.sep + os.path.join("torch", "distributed") + os.sep in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False
