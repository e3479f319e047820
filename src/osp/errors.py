"""The errors a user is meant to read: one line that names the file, key or value and how to mend it."""

import errno
import os
import re

# Errors of a machine or a disk that may come without the file's name, and what the user can do.
_OF_MACHINES = {
    errno.ENOSPC: "make room on the disk of output; the same command goes on",
    errno.EDQUOT: "make room within the quota; the same command goes on",
    errno.EROFS: "give an output on a file system that can be written",
    errno.EACCES: "give an output that you may write",
    errno.EPERM: "give an output that you may write",
    errno.EFBIG: "raise the limit to the size of files (`ulimit -f`)",
    errno.EIO: "the disk or the network fails",
    errno.ESTALE: "the network file system has lost the file",
    errno.EMFILE: "raise the limit to open files (`ulimit -n`), or use fewer workers",
    errno.ENFILE: "the machine has too many open files",
    errno.ENOMEM: "use fewer workers, a smaller batch, or a machine with more memory",
    errno.EAGAIN: "use fewer workers, or raise the limit to processes (`ulimit -u`)",
}
_FULL = re.compile(r"No space left on device|os error 28|Disk quota exceeded|File too large|os error 27")
_NO_WRITE = re.compile(r"PytorchStreamWriter failed|file write failed|unexpected pos")
_NO_MEMORY = re.compile(
    r"can't allocate memory|[Oo]ut of memory|failed to map segment|[Cc]annot allocate memory|bad_alloc|"
    r"(not|to) allocate memory"
)
_NO_THREAD = re.compile(r"can't start new thread|Resource temporarily unavailable")


class OspError(Exception):
    """An error in the user's files or machine; the command ends with exit code 1."""

    exit_code = 1


class UsageError(OspError):
    """An error in the user's command or configuration; the command ends with exit code 2."""

    exit_code = 2


class Stopped(OspError):
    """Somebody ended the work before it was done; nothing is wrong, and what worked on it can be used again."""


class DataError(OspError):
    """A file or folder that cannot be read, or holds nothing that can."""


class NotFiniteError(OspError):
    """A model gives numbers that are not finite, of which nothing can be made."""


def machine_error(error: BaseException) -> DataError | None:
    """The error to show where a disk, a limit or too little memory ended a command; None for any other exception."""
    if isinstance(error, OSError):
        known = error.errno in _OF_MACHINES
        if error.filename is None and not known:
            return None
        said = error.strerror or os.strerror(error.errno or errno.EIO)
        hint = f"; {_OF_MACHINES[error.errno]}" if known and error.errno is not None else ""
        place = "" if error.filename is None else f"{_text(error.filename)}: "
        return DataError(f"{place}{said}{hint}")
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError | ImportError) and _NO_MEMORY.search(text)):
        return DataError(f"not enough memory ({text[:200] or 'none is left'}); {_OF_MACHINES[errno.ENOMEM]}")
    if isinstance(error, RuntimeError) and _NO_THREAD.search(text):
        return DataError(f"{text[:200]}; {_OF_MACHINES[errno.EAGAIN]}")
    if not isinstance(error, ValueError | TypeError | KeyError | AssertionError):
        if found := _FULL.search(text):
            return DataError(f"{text[:300] if len(text) < 300 else found[0]}; {_OF_MACHINES[errno.ENOSPC]}")
        if isinstance(error, RuntimeError) and _NO_WRITE.search(text):
            return DataError(f"a file could not be written; {_OF_MACHINES[errno.ENOSPC]}")
    return None


def _text(path: object) -> str:
    return os.fsdecode(path) if isinstance(path, bytes) else str(path)
