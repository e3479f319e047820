"""Errors of the machine, as a run meets them, in one line: memory, disks, and processes that have died."""

import errno
import os
import re
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from osp.errors import DataError, OspError
from osp.files import write_whole
from osp.parallel.launch import NOT_MET
from osp.training.runs import is_first_process

_DISK = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO, errno.EROFS}
_MEMORY = re.compile(
    r"can't allocate memory|cannot allocate memory|not enough memory|std::bad_alloc|can't start new thread|"
    r"unable to mmap|out of memory",
    re.IGNORECASE,
)
_GONE = re.compile(r"connection (closed|reset|refused)|broken pipe|NCCL.*(abort|remote)", re.IGNORECASE)


PLACE = "process: "
"""How the note at an exception begins that says in which process of several it came."""
MISSING = "missing: "
"""How the note begins that says which other process is no more."""


class ProcessError(OspError):
    """An error in one process of several, which says in which."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def failures_told(folder: Path) -> Iterator[None]:
    """Raise what the block meets of the machine as DataError, naming the folder of the run where the disk is full.

    Of several processes each says its rank and host. An exception that is a bug passes through the first one with its
    traceback; those of the others are written into the folder.
    """
    try:
        yield
    except Exception as error:
        told, place = error if isinstance(error, OspError) else _told(error, folder), _place(error)
        if told is None and place is not None and not is_first_process():
            told = _with_file(error, folder)
        if told is None or (told is error and place is None):
            raise
        raise (told if place is None else ProcessError(f"{place}: {told}", told.exit_code)) from error


def _place(error: BaseException) -> str | None:
    """Rank, number of processes and host, where there are several."""
    if (noted := _note(error, PLACE)) is not None:
        return noted
    count = os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if not count.isdigit() or int(count) < 2:
        return None
    from lightning.pytorch.utilities import rank_zero_only

    return f"rank {getattr(rank_zero_only, 'rank', 0)} of {count} on {socket.gethostname()}"


def _note(error: BaseException, kind: str) -> str | None:
    notes = getattr(error, "__notes__", ())
    return next((note.removeprefix(kind) for note in notes if note.startswith(kind)), None)


def _with_file(error: Exception, folder: Path) -> OspError:
    """The error of another process than the first one in a line, its traceback in a file."""
    from lightning.pytorch.utilities import rank_zero_only

    line = f"{type(error).__name__}: {str(error).split(chr(10))[0][:300]}"
    path = folder / f"traceback_rank_{getattr(rank_zero_only, 'rank', 0)}.txt"
    try:
        write_whole(path, "".join(traceback.format_exception(error)))
    except OSError:
        return OspError(line)
    return OspError(f"{line} (its traceback is in {path})")


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
    is_apart = isinstance(error, NOT_MET)
    if is_apart or (isinstance(error, RuntimeError) and _GONE.search(str(error))):
        if (lost := _note(error, MISSING)) is not None:
            return DataError(f"{lost}; the same command goes on from the last checkpoint")
        if is_apart:
            return DataError(
                f"the processes of the run have not met ({text[:200]}); see that all are started, and that "
                "MASTER_ADDR and MASTER_PORT lead all to the first one"
            )
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
