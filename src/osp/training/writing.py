"""One checkpoint on its way to the disk, in one file or in a folder that all processes write.

It is written beside its place, and takes that when it is whole; whatever happens before leaves the one before it.
"""

import errno
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor

from osp.errors import DataError, OspError
from osp.files import discard, put_in_place, whole_at
from osp.training.sharded import entries_of, pieces_of
from osp.training.state import LAST, open_state
from osp.weights.lazy import Stored
from osp.weights.sharded import Piece, shards_missing, write_index, write_shard
from osp.weights.torch_writing import write_torch

_KEPT = re.compile(r"step-(\d{8,})\.ckpt")
_LATE = 60.0  # seconds in which a shared disk shows what another process has written
_LOOK = 0.1  # seconds from one look for that to the next


class Writing(Protocol):
    """The steps of writing a checkpoint, in their order; each process that writes takes each of them."""

    path: Path

    def write(self) -> None:
        """Write what this process has, beside the place."""
        ...

    def commit(self) -> None:
        """Give the checkpoint its place, once all have written; the first process does it."""
        ...

    def agree(self, error: BaseException | None) -> None:
        """Raise, in all processes, if one of them has met an error."""
        ...

    def drop(self) -> None:
        """Give it up, and delete what is half written."""
        ...


class FileWriting:
    """A checkpoint that one process writes into one file, as the tensors come; there is no second copy of them."""

    def __init__(self, checkpoint: dict[str, Any], path: Path, keep: int) -> None:
        self.path, self._checkpoint, self._keep = path, checkpoint, keep
        self._part = _part(path)

    def write(self) -> None:
        """See `Writing.write`."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        discard(self._part)
        write_torch(self._part, self._checkpoint)

    def commit(self) -> None:
        """See `Writing.commit`."""
        take_place(self._part, self.path, self._keep)

    def agree(self, error: BaseException | None) -> None:
        """See `Writing.agree`."""
        if error is None:
            return
        self.drop()
        if isinstance(error, OSError):
            raise _refused(self.path, error.errno or errno.EIO) from error
        raise error

    def drop(self) -> None:
        """See `Writing.drop`."""
        discard(self._part)


class FolderWriting:
    """A checkpoint in a folder, of which each process writes its own pieces (`osp.weights.sharded`).

    All processes of the strategy make one at once, and call the steps in the same order; without a strategy it is one
    process that writes all.
    """

    def __init__(
        self,
        checkpoint: Mapping[str, Any],
        names: Sequence[Mapping[int, str]],
        strategy: ParallelStrategy | None,
        path: Path,
        keep: int,
    ) -> None:
        self.path, self._strategy, self._keep = path, strategy, keep
        self._rank, self._ranks = (0, 1) if strategy is None else (strategy.global_rank, strategy.world_size)
        self.pieces = list(pieces_of(checkpoint, names, self._rank == 0))
        self._entries = entries_of(checkpoint)
        self._part = _part(path)
        self._dropped, self._written = threading.Event(), 0.0
        error = None
        try:
            if self._rank == 0:
                discard(self._part)
                self._part.mkdir(parents=True)
        except OSError as refused:
            error = refused
        self.agree(error)

    def write(self) -> None:
        """See `Writing.write`."""
        write_shard(self._part, self._rank, self.pieces)
        self.pieces = []

    def commit(self) -> None:
        """See `Writing.commit`; waits for the pieces of all processes."""
        if self._rank:
            return
        while missing := shards_missing(self._part, self._ranks):
            if self._dropped.wait(_LOOK):
                return
            if self._written and time.monotonic() - self._written > _LATE:
                raise DataError(
                    f"{self.path}: process {missing[0]} has written its part elsewhere; all processes of a sharded run "
                    "need the same output folder, on a disk that their machines share"
                )
        write_index(self._part, self._ranks, self._entries)
        take_place(self._part, self.path, self._keep)

    def agree(self, error: BaseException | None) -> None:
        """See `Writing.agree`; waits for the other processes."""
        number = 0 if error is None else error.errno or errno.EIO if isinstance(error, OSError) else errno.EIO
        worst = number << 16 | self._rank if number else 0
        if self._strategy is not None:
            flag = torch.tensor(worst, dtype=torch.int32, device=self._strategy.root_device)
            worst = int(self._strategy.reduce(flag, reduce_op="max"))
        if not worst:
            self._written = time.monotonic()
            return
        self.drop()
        if error is not None and not isinstance(error, OSError):
            raise error
        who = f" by process {worst & 0xFFFF}" if self._ranks > 1 else ""
        raise _refused(self.path, worst >> 16, who) from error

    def drop(self) -> None:
        """See `Writing.drop`."""
        self._dropped.set()
        if self._rank == 0:
            with suppress(OSError):  # another process still writes into it; the next start deletes it
                discard(self._part)


def take_place(part: Path, path: Path, keep: int) -> None:
    """Give a checkpoint that is written its place; of `last.ckpt` the ones before it stay, so that there are `keep`.

    They are called by their steps, as `step-00000500.ckpt`.
    """
    if keep == 1 or path.name != LAST:
        put_in_place(part, path)
        return
    put_in_place(part, path, _kept(path))
    kept = sorted((int(found[1]), one) for one in path.parent.iterdir() if (found := _KEPT.fullmatch(one.name)))
    for _, one in kept[: max(0, len(kept) - keep + 1)]:
        discard(one)


def _kept(path: Path) -> Path | None:
    """The name under which the checkpoint at `path` stays; None if it cannot be read."""
    if not os.path.lexists(whole_at(path)):
        return None
    try:
        return path.with_name(f"step-{open_state(path).step:08d}.ckpt")
    except OspError:
        return None


def in_memory(value: Any) -> Any:
    """A copy of everything, with tensors in the memory of the CPU."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Stored):
        return Stored.of(in_memory(value.read()))
    if isinstance(value, Piece):
        return Piece(value.key, in_memory(value.value), value.shape, value.begin)
    if isinstance(value, Mapping):
        return {key: in_memory(one) for key, one in value.items()}
    return [in_memory(one) for one in value] if isinstance(value, list) else value


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}.part")


def _refused(path: Path, number: int, who: str = "") -> DataError:
    before = "; the checkpoint before it is whole" if os.path.lexists(whole_at(path)) else ""
    return DataError(
        f"{path}: cannot be written{who} ({os.strerror(number)}){before}; make room, and run the same command again"
    )
