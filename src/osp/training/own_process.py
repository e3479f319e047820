"""`osp train` in a process of its own: its messages, its signals, and how it ended.

A stage of a chain runs so, and a job of a sweep that takes several processes: Lightning starts the further ones with
the command line of the first, which must be that of one run and not that of a whole sweep.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

from osp.errors import OspError, UsageError

_LAST_WORDS = 10.0  # seconds for the messages of a process that has ended; one that it left behind may hold the pipe
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class RunError(OspError):
    """A run in a process of its own has failed; what started it ends with the same code."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Outcome:
    """The end of a run: its exit code, the line of its error, and the signal that this process was ended by."""

    code: int
    said: str
    signal: int | None


def run_train(overrides: Sequence[str], options: Sequence[str] = (), keep: Sequence[int] = ()) -> Outcome:
    """Run `osp train` with these overrides and options, passing its messages on, and signals to it.

    It inherits the file descriptors `keep`. The line of its result is left out, as that is in its folder.
    """
    command = [sys.executable, "-m", "osp.cli", "train", *options, *overrides]
    with _passed_on() as signals:
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", pass_fds=keep
        )
        said: list[str] = []
        reader = threading.Thread(target=_read, args=(child, said), daemon=True)
        reader.start()
        signals.reach(child)
        try:
            child.wait()
        except BaseException:
            child.terminate()
            child.wait()
            raise
        reader.join(_LAST_WORDS)
    code = child.returncode if child.returncode >= 0 else 128 - child.returncode
    line = said[0] if said else f"`osp train` ended with exit code {code}; its messages are above"
    return Outcome(code, line, signals.first)


def _read(child: "subprocess.Popen[str]", said: list[str]) -> None:
    """Write the messages of a process to stderr, but for the line of its error, which goes to `said`."""
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("osp train: ") and not said:
            said.append(line.removeprefix("osp train: ").strip())
        elif not line.startswith("{"):
            with suppress(OSError, ValueError):  # nobody listens
                sys.stderr.write(line)


class _Signals:
    """Signals on their way to a run, which writes a checkpoint and ends by the first, and at once by the second."""

    def __init__(self) -> None:
        self.first: int | None = None
        self._run: subprocess.Popen[str] | None = None

    def reach(self, run: "subprocess.Popen[str]") -> None:
        """Send on what comes from now on, and what came before."""
        self._run = run
        if self.first is not None:
            run.send_signal(self._first_one())

    def take(self, number: int, frame: FrameType | None) -> None:
        """Pass a signal on. A terminal sends ^C to the run too: this one must not be its second."""
        again, self.first = self.first is not None, self.first or number
        if self._run is not None:
            self._run.send_signal(signal.SIGINT if again and number == signal.SIGINT else self._first_one())

    def _first_one(self) -> int:
        return signal.SIGUSR1 if self.first == signal.SIGUSR1 else signal.SIGTERM


@contextmanager
def _passed_on() -> Iterator[_Signals]:
    """Takes the signals that end a command, in the block, so that no run is left behind."""
    signals = _Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    taken = [one for one in _PASSED_ON if signal.getsignal(one) != signal.SIG_IGN]
    before = {number: signal.signal(number, signals.take) for number in taken}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def refuse_several_processes(what: str, environ: Mapping[str, str] = os.environ) -> None:
    """Raise UsageError where a launcher has started this command in several processes, of which each would do it all.

    `what` is what starts the processes of its runs itself.
    """
    launchers = {"WORLD_SIZE": "torchrun", "SLURM_STEP_NUM_TASKS": "srun"}
    for key, launcher in launchers.items():
        count = environ.get(key, "1")
        if count.isdigit() and int(count) > 1 and (launcher != "torchrun" or "RANK" in environ):
            raise UsageError(
                f"{what} starts the processes of each run itself, and {launcher} has started it {count} times; leave "
                f"{launcher} out, or start one run by it"
            )
