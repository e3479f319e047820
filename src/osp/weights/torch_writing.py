"""Torch files, written by torch's own writer."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from osp.files import discard, sync


def write_torch(path: Path, content: Mapping[str, Any]) -> None:
    """Write a torch file where there is none, tensor by tensor, and bring it to the disk.

    Tensors that lie in a mapped file take no memory. Raises OSError with the reason if the file cannot be written; what
    is half written is deleted.
    """
    disk: _Disk | None = None
    try:
        with open(path, "xb") as file:  # no link that somebody put there is followed
            disk = _Disk(file)
            torch.save(content, cast(Any, disk))
            sync(file)
    except BaseException as error:
        discard(path)
        if disk is not None and disk.error is not None and not isinstance(error, OSError):
            raise disk.error from error
        raise


class _Disk:
    """A file for torch.save, which hides the reason of a failed write behind an error of its own."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()
