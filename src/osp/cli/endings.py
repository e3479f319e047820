"""How a command ends that does not end by itself: ^C, SIGTERM, and a pipe that nobody reads any more."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from osp.cli.printing import say
from osp.errors import OspError

_SELF = ("train", "chain")  # these have a state to save first, and know its step


class Terminated(KeyboardInterrupt):
    """SIGTERM has come; nothing that catches errors catches it."""


@contextmanager
def says_when_terminated(verb: str) -> Iterator[None]:
    """Within it SIGTERM raises `Terminated`, in this process only, so that what is half written is taken away."""
    if verb in _SELF:
        yield
        return
    process = os.getpid()

    def terminated(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a worker that was forked
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, terminated)
    except ValueError:  # not in the main thread, where there are no signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def ended(verb: str, command: Callable[[], int]) -> int:
    """The exit code of a command; where it was stopped, or its output is not taken, one line says so."""
    said = "osp" if verb.startswith("-") else f"osp {verb}"
    try:
        return command()
    except OspError as error:
        say(f"{said}: {error}")
        return error.exit_code
    except Terminated:
        say(f"osp {verb}: stopped by SIGTERM; the same command goes on")
        return 143
    except KeyboardInterrupt:
        say(f"osp {verb}: stopped; the same command goes on")
        return 130
