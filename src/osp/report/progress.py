"""How far a long piece of work is, and how long it will still take."""

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger(__name__)

_EVERY = 30.0  # seconds between two lines of the log


@contextmanager
def shown_progress(what: str) -> Iterator[Callable[[float, float], None]]:
    """A function to call with how many parts are done, and fractions of them, and with how many there are.

    On a terminal it moves a bar; elsewhere it writes a log line now and then.
    """
    if sys.stderr.isatty():
        columns = TextColumn(what), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), TimeRemainingColumn()
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, parts: bar.update(task, completed=done, total=parts)
        return
    begun = last = time.monotonic()

    def tell(done: float, parts: float) -> None:
        nonlocal last
        now = time.monotonic()
        if done > 0 and now - last >= _EVERY:
            last = now
            left = (now - begun) * (parts - done) / done
            log.info("%s: %.0f %% done, about %.0f s left", what, 100 * done / parts, left)

    yield tell
