"""Errors of the machine, as a run meets them, in one line: memory, disks, and processes that have died."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from osp.errors import DataError, OspError
from osp.training.runs import is_first_process

_DISK = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO, errno.EROFS}
_MEMORY = re.compile(
    r"can't allocate memory|cannot allocate memory|not enough memory|std::bad_alloc|can't start new thread|"
    r"unable to mmap|out of memory",
    re.IGNORECASE,
)
_GONE = re.compile(r"connection (closed|reset|refused)|broken pipe|NCCL.*(abort|remote)", re.IGNORECASE)


@contextmanager
def failures_told(folder: Path) -> Iterator[None]:
    """Raise what the block meets of the machine as DataError, naming the folder of the run where the disk is full."""
    try:
        yield
    except OspError:
        raise
    except Exception as error:
        told = _told(error, folder)
        if told is None:
            raise
        raise told from error


def _told(error: Exception, folder: Path) -> OspError | None:
    before = error.__context__
    while before is not None:  # a logger that cannot be closed hides why it was to be closed
        if isinstance(before, OspError):
            return before
        before = before.__context__
    text = str(error).split("\n")[0]
    if isinstance(error, OSError):
        if error.errno in _DISK and error.filename is None:
            return DataError(
                f"{folder}: cannot be written ({error.strerror}); make room, and run the same command again"
            )
        return _memory(text) if error.errno == errno.ENOMEM else None
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and _MEMORY.search(text)
    ):
        return _memory(text)
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        return worker_died(text)
    if isinstance(error, RuntimeError) and _GONE.search(str(error)):
        which = "another process of the run" if is_first_process() else "the first process of the run"
        return DataError(f"{which} has ended; its message tells why")
    return None


def _memory(text: str) -> DataError:
    return DataError(
        f"out of memory ({text[:200] or 'no more can be allocated'}); choose a smaller data.batch_size (with "
        "module.accumulate for the same steps), fewer data.workers, or smaller clips"
    )


def worker_died(reason: str) -> DataError:
    """The error of a run whose reading process has died."""
    return DataError(
        f"a process that reads clips has died ({reason}): out of memory, or ended from outside; use fewer data.workers "
        "or a smaller data.batch_size, and run the same command again"
    )
