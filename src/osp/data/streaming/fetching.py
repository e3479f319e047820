"""A file from elsewhere, fetched whole: checked, and tried again with growing pauses."""

import hashlib
import logging
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import BinaryIO

from osp.checks import check_number
from osp.data.streaming.opening import Fault, Stream, opened
from osp.data.streaming.urls import shown
from osp.documents import MIB
from osp.errors import OspError

log = logging.getLogger(__name__)

_BLOCK = 512  # bytes of a block of a tar
_LONGEST_PAUSE = 60.0


class ShardFetchError(OspError):
    """A file from elsewhere that cannot be had: the run ends, since a shard's clips must not be replaced in silence."""


@dataclass(frozen=True)
class Patience:
    """How often, and after which pauses, a file is asked for.

    Args:
        attempts: how often a file is asked for before its failure ends the run.
        pause: seconds before the second attempt; each further pause is twice as long, at most a minute.
        timeout: the longest wait for the next bytes, seconds.
    """

    attempts: int = 6
    pause: float = 1.0
    timeout: float = 60.0

    def __post_init__(self) -> None:
        check_number("attempts", self.attempts, 1, 100, whole=True)
        check_number("pause", self.pause, 0)
        check_number("timeout", self.timeout, above=0)

    def once(self) -> "Patience":
        """A single attempt."""
        return replace(self, attempts=1)


@dataclass(frozen=True)
class Remote:
    """A file that lies elsewhere, and what is known of it.

    Args:
        url: where it lies.
        size: bytes; None: not known.
        sha256: of its content; None: not known.
        tar: whether it must end as a tar ends, where its size is not known.
    """

    url: str
    size: int | None = None
    sha256: str | None = None
    tar: bool = False


def fetch(
    remote: Remote,
    file: BinaryIO,
    patience: Patience,
    most: int,
    reserve: Callable[[int, bool], None] = lambda size, grows: None,
) -> str:
    """The SHA-256 of a file that has been written into `file`, which then holds nothing else.

    Args:
        most: bytes that the file may have.
        reserve: is told how many bytes the file needs, before they are written, and whether it may grow further since
            nobody has said its size.

    Raises ShardFetchError naming the url and the last failure (for http the status, of a command the exit code).
    """
    for attempt in range(1, patience.attempts + 1):
        try:
            return _fetch_once(remote, file, patience.timeout, most, reserve)
        except Fault as fault:
            if not fault.again or attempt == patience.attempts:
                tries = f" ({attempt} attempts)" if attempt > 1 else ""
                raise ShardFetchError(
                    f"{shown(remote.url)}: {fault.reason}{tries}; check that it can be read"
                ) from fault
            pause = min(_LONGEST_PAUSE, max(fault.wait, patience.pause * 2 ** (attempt - 1)))
            # Spread by a quarter: many processes that failed together do not come back together.
            pause *= 1 + random.Random().random() / 4
            log.info("%s: %s; asked for again in %.1f s", shown(remote.url), fault.reason, pause)
            time.sleep(pause)
    raise AssertionError("at least one attempt is made")


def _fetch_once(remote: Remote, file: BinaryIO, timeout: float, most: int, reserve: Callable[[int, bool], None]) -> str:
    with opened(remote.url, timeout) as stream:
        size = stream.size if stream.size is not None else remote.size
        if size is not None and remote.size is not None and size != remote.size:
            raise Fault(f"has {size} bytes, {remote.size} are listed")
        if size is not None:
            _check_most(size, most)
            reserve(size, False)
        received, sha256 = _copy(stream, file, most, reserve if size is None else None)
    if size is not None and received != size:
        raise Fault(f"cut off after {received} of {size} bytes")
    if remote.sha256 is not None and sha256 != remote.sha256:
        raise Fault("its content is not that which is listed (SHA-256)")
    if remote.tar and remote.sha256 is None and stream.size is None and not _ends_as_tar(file, received):
        raise Fault(f"cut off, or no tar: no end mark after {received} bytes")
    return sha256


def _copy(stream: Stream, file: BinaryIO, most: int, reserve: Callable[[int, bool], None] | None) -> tuple[int, str]:
    """How many bytes came, and their SHA-256."""
    digest, received = hashlib.sha256(), 0
    file.seek(0)
    while data := stream.read(MIB):
        received += len(data)
        _check_most(received, most)
        if reserve is not None:
            reserve(received, True)
        file.write(data)
        digest.update(data)
    file.truncate(received)
    file.flush()
    return received, digest.hexdigest()


def _check_most(size: int, most: int) -> None:
    if size > most:
        raise Fault(f"has {size} bytes or more, at most {most} are read", again=False)


def _ends_as_tar(file: BinaryIO, size: int) -> bool:
    """Whether the last blocks are the two empty ones that close a tar."""
    if size < 2 * _BLOCK or size % _BLOCK:
        return False
    file.seek(-2 * _BLOCK, os.SEEK_END)
    return not file.read(2 * _BLOCK).strip(b"\0")
