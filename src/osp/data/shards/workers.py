"""Runs functions in worker processes, in order; one that kills its process costs its own result and no other."""

import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Self

from osp.errors import OspError

log = logging.getLogger(__name__)

PATIENCE = 4 * 3600.0  # seconds for one file: a decoder that hangs must not hold up all that come after
_ITEM, _END, _ERROR = range(3)


class Crashed:
    """The result of a call that ended its process (a segmentation fault in a decoder, no memory left)."""


@dataclass(eq=False)
class _Task:
    call: tuple[Any, ...]
    future: Future[Any] | None = None
    crashed: bool = False


class Workers:
    """A pool of processes; with `count` 0 everything runs in this one, and a crash is not contained.

    Args:
        preload: modules that the workers need, imported once and not in each of them.
        patience: seconds after which a call that has given nothing counts as crashed, and its process is ended.
    """

    def __init__(self, count: int, preload: Iterable[str] = (), patience: float = PATIENCE) -> None:
        self.count, self.patience = count, patience
        self._tasks: deque[_Task] = deque()  # handed in, result not yet taken
        # A fork server: its children are clean of this process' threads, and share what it has imported.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["__main__", *preload])
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=error is None, cancel_futures=True)

    def in_order(self, calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
        """The results of `function(*arguments)` for each call (function, *arguments), in their order.

        Two calls a worker at most are under way or wait to be taken. A call may be `Crashed`; what it raises is raised.
        """
        tasks: deque[_Task] = deque()
        for call in calls:
            tasks.append(self._submit(call))
            if len(tasks) >= max(2 * self.count, 1):
                yield self._result(tasks.popleft())
        while tasks:
            yield self._result(tasks.popleft())

    def stream(self, function: Callable[..., Iterable[Any]], *arguments: Any) -> Iterator[Any]:
        """The items of a generator, which runs in a process of its own and goes no more than a few items ahead.

        `Crashed` is the last item if the process died or gave nothing for `patience` seconds. The generator's error is
        raised.
        """
        if self.count == 0:
            yield from function(*arguments)
            return
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_send, args=(sender, function, arguments), daemon=True)
        process.start()
        sender.close()
        try:
            while receiver.poll(self.patience):
                kind, value = receiver.recv()
                if kind == _END:
                    return
                if kind == _ERROR:
                    raise value
                yield value
            yield Crashed()
        except EOFError:
            yield Crashed()
        finally:
            receiver.close()
            process.kill()
            process.join()

    def _submit(self, call: tuple[Any, ...]) -> _Task:
        task = _Task(call)
        if self.count > 0:
            if self._executor is None:
                self._executor = self._start(self.count)
            self._tasks.append(task)
            try:
                task.future = self._executor.submit(*call)
            except BrokenProcessPool:
                self._recover()
        return task

    def _result(self, task: _Task) -> Any:
        if self.count == 0:
            function, *arguments = task.call
            return function(*arguments)
        try:
            return self._value(task)
        except (BrokenProcessPool, TimeoutError):
            self._recover()
            return self._value(task)
        finally:
            self._tasks.remove(task)

    def _value(self, task: _Task) -> Any:
        return Crashed() if task.crashed or task.future is None else task.future.result(self.patience)

    def _recover(self) -> None:
        """A worker died, and with it every call under way: run these one by one to find the one that kills."""
        if self._executor is not None:
            _kill(self._executor)  # one may hang; those that are done have given their result
            self._executor.shutdown(wait=True, cancel_futures=True)
        log.info("a worker process died or hangs; its calls are run again, one by one")
        alone: ProcessPoolExecutor | None = None
        for task in self._tasks:
            if task.crashed or (task.future is not None and not _broken(task.future)):
                continue
            alone = alone or self._start(1)
            task.future = alone.submit(*task.call)
            if _broken(task.future, self.patience):
                _kill(alone)
                alone.shutdown()
                alone, task.crashed = None, True
        if alone is not None:
            alone.shutdown()
        self._executor = self._start(self.count)

    def _start(self, count: int) -> ProcessPoolExecutor:
        executor = ProcessPoolExecutor(count, mp_context=self._context, initializer=_prepare)
        try:
            executor.submit(os.getpid).result()
        except BrokenProcessPool as error:
            raise OspError("worker processes cannot be started here; use workers=0") from error
        return executor


def _broken(future: Future[Any], patience: float | None = None) -> bool:
    """Whether its process died, or gave nothing for so many seconds (waits until that is known)."""
    try:
        return isinstance(future.exception(patience), BrokenProcessPool)
    except (CancelledError, TimeoutError):
        return True


def _kill(executor: ProcessPoolExecutor) -> None:
    """Ends the processes of a pool, which would be waited for otherwise."""
    for process in list((executor._processes or {}).values()):
        process.kill()


def _send(sender: Connection, function: Callable[..., Iterable[Any]], arguments: tuple[Any, ...]) -> None:
    """In a process of its own: what a generator gives, then that it has ended or what it raised."""
    _prepare()
    try:
        for item in function(*arguments):
            sender.send((_ITEM, item))
        sender.send((_END, None))
    except Exception as error:  # noqa: BLE001 - the parent raises it
        sender.send((_ERROR, error))


def _prepare() -> None:
    """In a worker: leave Ctrl-C to the parent, and end when the parent is gone, even if it was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def default_workers() -> int:
    """One for every core that this process may use."""
    return len(os.sched_getaffinity(0))
