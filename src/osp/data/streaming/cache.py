"""The local cache of shards: a folder of bounded size, which any number of processes and threads share.

A shard lies in it whole or not at all. Whoever needs one that is missing fetches it under a temporary name, locked, so
that the others wait for it; the lock goes with its process, and what a killed one leaves is removed by the next. Room
is made by removing what was read longest ago. A file that is removed stays readable for those that have it open.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from osp.data.streaming.fetching import Patience, Remote, fetch
from osp.data.streaming.urls import shown
from osp.documents import MIB
from osp.errors import DataError
from osp.files import folder_lock, sync

_STEP = 64 * MIB  # by which room grows for a file whose size nobody has said
_WAIT = 0.05  # seconds between two looks for room


class ShardCache:
    """The cache in a folder of its own.

    Args:
        folder: is made if it is missing.
        limit: bytes of all shards together, those being fetched included.
    """

    def __init__(self, folder: Path, limit: int, patience: Patience) -> None:
        self.folder, self.limit, self.patience = folder, limit, patience
        folder.mkdir(parents=True, exist_ok=True)

    def open(self, remote: Remote, patience: Patience | None = None) -> BinaryIO:
        """The shard, open for reading; it is fetched if it is not there.

        Raises ShardFetchError if it cannot be had, or is larger than the cache.
        """
        path = self.path(remote)
        while True:
            with contextlib.suppress(FileNotFoundError):
                file = open(path, "rb")  # noqa: SIM115
                os.utime(path)  # the time of its last use
                return file
            part = self._lock_part(path)
            if part is None:
                continue
            try:
                self._fill(part, path, remote, patience or self.patience)
            except BaseException:
                part.close()
                raise
            part.seek(0)
            return part

    def has(self, remote: Remote) -> bool:
        """Whether the shard is there."""
        return self.path(remote).exists()

    def rename(self, remote: Remote, known: Remote) -> None:
        """Let a shard that is there be found by what is known of it now."""
        with contextlib.suppress(FileNotFoundError):
            os.replace(self.path(remote), self.path(known))

    def path(self, remote: Remote) -> Path:
        """Where the shard lies when it is there."""
        # With its checksum or size: what has changed under its url is another file.
        digest = hashlib.sha256(f"{remote.url}\n{remote.sha256 or remote.size}".encode()).hexdigest()[:24]
        name = re.sub(r"[^\w.-]+", "_", urlsplit(remote.url).path.rpartition("/")[2], flags=re.ASCII)[-60:]
        return self.folder / f"{digest}-{name.removesuffix('.tar')}.tar"

    def _lock_part(self, path: Path) -> BinaryIO | None:
        """The locked temporary file of a shard; None if, after waiting for it, the shard may be there."""
        part = _part_of(path)
        file = os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT, 0o600), "r+b")
        with contextlib.suppress(FileNotFoundError):
            fcntl.flock(file, fcntl.LOCK_EX)
            # Renamed or removed since it was opened: then it is not the temporary file any more.
            if os.path.samestat(os.fstat(file.fileno()), os.stat(part)):
                if not path.exists():
                    return file
                part.unlink()
        file.close()
        return None

    def _fill(self, part: BinaryIO, path: Path, remote: Remote, patience: Patience) -> None:
        temporary = _part_of(path)
        try:
            with contextlib.ExitStack() as locks:

                def reserve(size: int, grows: bool) -> None:
                    if grows and os.fstat(part.fileno()).st_size == 0:
                        # One at a time: two that grow could wait for each other's room.
                        locks.enter_context(folder_lock(self.folder, ".growing.lock"))
                    self._reserve(part, temporary, self._step(size) if grows else size)

                fetch(remote, part, patience, self.limit, reserve)
            sync(part)
            os.replace(temporary, path)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            if isinstance(error, OSError):
                error.filename = str(path)  # a full disk names no file
            raise

    def _step(self, size: int) -> int:
        """The room for a file that has so many bytes already, and of which nobody knows the end."""
        step = max(1, min(_STEP, self.limit // 16))
        return min(self.limit, -(-size // step) * step)

    def _reserve(self, part: BinaryIO, temporary: Path, size: int) -> None:
        """Gives the temporary file its room, as its length, once the files of others leave it."""
        while os.fstat(part.fileno()).st_size < size:
            with folder_lock(self.folder, ".room.lock"):
                if self._make_room(size, temporary):
                    os.ftruncate(part.fileno(), size)
                    return
            time.sleep(_WAIT)

    def _make_room(self, wanted: int, own: Path) -> bool:
        """Whether so many bytes are free beside the others' files, after removing those read longest ago."""
        parts = [path for path in self.folder.glob(".*.part") if path != own and not _removed_if_left(path)]
        taken = sum(_size(path) for path in parts)
        files = sorted(self._files())
        held = taken + sum(size for _, size, _ in files)
        for _, size, path in files:
            if held + wanted <= self.limit:
                break
            path.unlink(missing_ok=True)
            held -= size
        return held + wanted <= self.limit

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """(Time of last use, bytes, path) of each shard."""
        for path in self.folder.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):
                about = path.stat()
                yield about.st_mtime, about.st_size, path


def _part_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _removed_if_left(part: Path) -> bool:
    """Whether a temporary file is gone: where nobody holds its lock, its process has ended, and it is removed."""
    try:
        with open(part, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(part)):
                part.unlink()
    except BlockingIOError:
        return False
    except FileNotFoundError:
        pass
    return True


def check_fits(largest: Remote, limit: int) -> None:
    """Raise DataError if not even two of the largest shard fit into a cache of `limit` bytes."""
    if largest.size is not None and 2 * largest.size > limit:
        raise DataError(
            f"{shown(largest.url)}: has {largest.size} bytes, and a cache of {limit} bytes holds no two such shards; "
            "raise cache_bytes, or write smaller shards"
        )
