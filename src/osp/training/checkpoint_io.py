"""How training checkpoints are written, whole or not at all, and read to go on from."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import lightning
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.strategies import ParallelStrategy

from osp.checks import check_choice, check_number
from osp.parallel.state import StateInParts
from osp.training.resumed import read_resumed
from osp.training.sharded import parameter_names
from osp.training.writing import FileWriting, FolderWriting, Writing, in_memory

FORMS = ("auto", "file", "folder")


class AtomicCheckpointIO(CheckpointIO):
    """Writes a checkpoint beside its place and renames it, so that whatever happens leaves the one before it whole.

    Of what is read only those parts come out that a run goes on with (`osp.training.resumed`).

    Args:
        form: `file`, of the whole state, or `folder`, in which each process writes what it holds. `auto` is a folder
            for a model that is sharded among processes, and else a file.
        keep: so many checkpoints stay: `last.ckpt`, and the ones before it, by their steps.
        background: the state is copied into the memory of the CPU, and a thread writes it while training goes on. The
            next checkpoint waits for it.

    Raises UsageError for another form, or less than one checkpoint.
    """

    def __init__(self, form: str = "auto", keep: int = 1, background: bool = False) -> None:
        check_choice("checkpoint_form", form, FORMS)
        check_number("checkpoint_keep", keep, least=1, whole=True)
        self.form, self.keep, self.background = form, keep, background
        self._module: lightning.LightningModule | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._pending: tuple[Writing, Future[None], Future[None] | None] | None = None

    def bind(self, module: lightning.LightningModule) -> None:
        """Say what is trained, before anything is read or written: a folder holds the names of its parameters."""
        self._module = module

    @property
    def _is_sharded(self) -> bool:
        return self._module is not None and isinstance(self._module.trainer.strategy, StateInParts)

    @property
    def in_pieces(self) -> bool:
        """Whether each process writes what it holds, so that no process needs all of it."""
        return self.form == "folder" or (self.form == "auto" and self._is_sharded)

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write the checkpoint at `path`; by all processes at once if they hold parts of it.

        Raises DataError naming it if the disk does not take it.
        """
        self.finish()
        writing = self._writing(checkpoint, Path(path))
        if not self.background:
            self._pending = writing, _now(writing.write), None
            self.finish()
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "checkpoint")
        written = self._thread.submit(writing.write)
        committed = self._thread.submit(lambda: None if written.exception() else writing.commit())
        self._pending = writing, written, committed

    def _writing(self, checkpoint: dict[str, Any], path: Path) -> Writing:
        if not self.in_pieces:
            return FileWriting(in_memory(checkpoint) if self.background else checkpoint, path, self.keep)
        assert self._module is not None
        strategy = self._module.trainer.strategy
        all_write = isinstance(strategy, ParallelStrategy) and self._is_sharded
        names = parameter_names(self._module, strategy.optimizers)
        writing = FolderWriting(
            checkpoint, names, cast(ParallelStrategy, strategy) if all_write else None, path, self.keep
        )
        if self.background:
            writing.pieces = [in_memory(piece) for piece in writing.pieces]
        return writing

    def finish(self) -> None:
        """Wait until the last checkpoint is on the disk, together with the other processes that write it.

        Raises DataError naming it if the disk does not take it.
        """
        if self._pending is None:
            return
        (writing, written, committed), self._pending = self._pending, None
        writing.agree(written.exception())
        writing.agree((committed or _now(writing.commit)).exception())

    def teardown(self) -> None:
        """Leave nothing half-written where a run ends otherwise; a process alone brings its checkpoint to its end."""
        if self._pending is not None:
            (writing, written, committed), self._pending = self._pending, None
            if self._is_sharded or written.exception() is not None:
                writing.drop()
            elif committed is not None:
                committed.exception()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The parts of the checkpoint at `path` that a run goes on with, on the CPU or still in its files."""
        return read_resumed(path, in_parts=self._is_sharded)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint file; a folder is never deleted."""
        path = Path(path)
        if path.is_file() or path.is_symlink():
            path.unlink()


def finish_saving(trainer: lightning.Trainer) -> None:
    """Wait until the Trainer's last checkpoint is on the disk. Raises DataError if the disk does not take it."""
    if isinstance(writer := trainer.strategy.checkpoint_io, AtomicCheckpointIO):
        writer.finish()


def _now(work: Callable[[], None]) -> "Future[None]":
    """The outcome of some work that is done at once, as that of a thread."""
    outcome: Future[None] = Future()
    try:
        work()
        outcome.set_result(None)
    except Exception as error:  # noqa: BLE001  (whoever asks for the outcome raises it)
        outcome.set_exception(error)
    return outcome
