"""Shards that are fetched before they are needed, by threads of the process that reads."""

import contextlib
import os
import queue
import threading
from collections.abc import Sequence
from typing import Any

from osp.data.streaming.cache import ShardCache
from osp.data.streaming.fetching import Remote
from osp.errors import OspError

_THREADS = 4


class ReadAhead:
    """Fetches shards into the cache in the background.

    A failure is no error here: whoever reads the shard tries as often as it is allowed to, and says so.
    """

    def __init__(self, cache: ShardCache, shards: Sequence[Remote]) -> None:
        self.cache, self.shards = cache, shards
        self._process = -1
        self._pending: set[int] = set()
        self._queue: queue.SimpleQueue[int] = queue.SimpleQueue()

    def __getstate__(self) -> dict[str, Any]:
        return {"cache": self.cache, "shards": self.shards}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def want(self, numbers: Sequence[int]) -> None:
        """Have these shards fetched, the first one first, unless they are there; returns at once."""
        self._begin()
        for number in numbers:
            if number not in self._pending and not self.cache.has(self.shards[number]):
                self._pending.add(number)
                self._queue.put(number)

    def _begin(self) -> None:
        """Threads of this process: those of the one that it was forked from did not come along."""
        if self._process == os.getpid():
            return
        self._process = os.getpid()
        self._pending, self._queue = set(), queue.SimpleQueue()
        for _ in range(_THREADS):
            threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            number = self._queue.get()
            with contextlib.suppress(OspError, OSError):
                self.cache.open(self.shards[number], self.cache.patience.once()).close()
            self._pending.discard(number)
