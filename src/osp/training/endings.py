"""How a run ends when somebody asks it to: ^C and signals write a checkpoint at a step's end first.

`Endings` takes the signals, and `EndBySignal` ends the training between two steps, in a validation, or while clips are
waited for. The checkpoint is that of the last step that was finished; a validation of that step that was cut off is
made again when the run goes on, so that it repeats an undisturbed one.
"""

import copy
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import lightning
import torch
from lightning.pytorch.callbacks import Callback

from osp.training.checkpoint_io import finish_saving
from osp.training.cluster import requeued
from osp.training.runs import TrainingRun, is_first_process
from osp.training.saving import LastCheckpoint, remove_parts, validates

log = logging.getLogger(__name__)

SIGNALS = {signal.SIGINT: "^C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP", signal.SIGUSR1: "SIGUSR1"}
"""Those that ask a run to end, and how they are called."""
_SAME = 0.5  # seconds in which a second ^C is the first one, delivered twice by a shell or a launcher


class Ended(BaseException):
    """A signal ends the run; what was to be saved is saved."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Endings:
    """The signals that ask a run to end, from `install` to `restore`.

    `asked` is the first that came. While nothing would be lost (`may_leave`) it raises `Ended` where the program
    stands; else the training looks at `asked` when a step is over. A second ^C ends the process at once.

    With `requeue` SIGUSR1, as SLURM sends before a job's time is over, puts the job into the queue again.
    """

    def __init__(self, run: TrainingRun, requeue: bool = False) -> None:
        self.run, self.requeue = run, requeue
        self.asked: int | None = None
        self.may_leave = True
        self._when = 0.0
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Take the signals, unless they are ignored, as under nohup; again after somebody else has taken them."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            now = signal.getsignal(number)
            if now is not signal.SIG_IGN and now != self._take:
                self._before.setdefault(number, now)
                signal.signal(number, self._take)

    def restore(self) -> None:
        """Give the signals back to who had them before."""
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While the block waits for clips, a signal ends the run where it stands."""
        if self.asked is not None:
            raise Ended(self.asked)
        before, self.may_leave = self.may_leave, True
        try:
            yield
        finally:
            self.may_leave = before

    def leave_if_asked(self) -> None:
        """End the process with the code of the signal, if one came after the last step."""
        if self.asked is not None:
            sys.exit(128 + self.asked)

    def _take(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked is not None:
            if number == signal.SIGINT and now - self._when > _SAME:
                _at_once(self.run)
            return
        self.asked, self._when = number, now
        if self.may_leave:
            raise Ended(number)
        if is_first_process():
            _tell("ending with a checkpoint when this step is over; ^C ends at once and without one")


def _at_once(run: TrainingRun) -> NoReturn:
    remove_parts([run.folder, run.last.parent])
    _tell("ended at once")
    os._exit(128 + signal.SIGINT)


def _tell(line: str) -> None:
    os.write(2, f"osp train: {line}\n".encode())  # a log's lock may be held where a signal arrives


class EndBySignal(Callback):
    """Ends the training when a signal asks for it, in all processes after the same step, and writes `last.ckpt`."""

    def __init__(self, endings: Endings) -> None:
        self.endings = endings
        self.saved: int | None = None  # the step of the checkpoint that was written at the end
        self._loops: dict[str, Any] | None = None  # the counts as the last step left them
        self._validating = False  # whether the validation of the last step is not over yet
        self._saving = False
        self._due = False  # whether a validation was cut off before the run went on

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Take the signals, which Lightning has taken meanwhile, and make the validation that was cut off."""
        self.endings.install()
        self.endings.may_leave = False
        if self._due:
            self._due = False
            self._validate_again(trainer)

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        """End here if it is asked for."""
        self._loops = copy.deepcopy(trainer.fit_loop.state_dict())
        self._validating = validates(trainer)
        self._end_if_asked(trainer)

    def on_validation_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        """End here if it is asked for."""
        if not trainer.sanity_checking:
            self._end_if_asked(trainer)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """The validation is over, and a checkpoint says nothing of it."""
        self._validating = False

    def on_exception(self, trainer: lightning.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Write the checkpoint, if steps were made and checkpoints are kept."""
        keeps = any(isinstance(callback, LastCheckpoint) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if not isinstance(exception, Ended) or self._loops is None or not keeps:
            return
        self.endings.may_leave = False
        self._saving = True
        trainer.save_checkpoint(self.endings.run.last)
        finish_saving(trainer)
        self.saved = trainer.global_step

    def on_save_checkpoint(self, trainer: lightning.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """The checkpoint of an end has the counts of a step's end, wherever the signal came."""
        if self._saving:
            checkpoint["loops"]["fit_loop"] = self._loops

    def state_dict(self) -> dict[str, Any]:
        """Whether a validation has to be made again."""
        return {"validation_due": self._saving and self._validating}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take it over."""
        self._due = bool(state_dict.get("validation_due"))

    def _end_if_asked(self, trainer: lightning.Trainer) -> None:
        asked = self.endings.asked or 0
        if trainer.world_size > 1:
            flag = torch.tensor(float(asked), device=trainer.strategy.root_device)
            asked = int(trainer.strategy.reduce(flag, reduce_op="max"))
        if asked:
            self.endings.asked = self.endings.asked or asked
            raise Ended(asked)

    def _validate_again(self, trainer: lightning.Trainer) -> None:
        connector = trainer._logger_connector
        first, loop = connector._first_loop_iter, trainer.fit_loop.epoch_loop.val_loop
        self._validating = True
        self._loops = copy.deepcopy(trainer.fit_loop.state_dict())
        trainer.validating, loop.restarting = True, False
        loop.run()
        trainer.training, connector._first_loop_iter = True, first


def leave(
    run: TrainingRun, ended: Ended, saved: int | None = None, steps: int | None = None, requeue: bool = False
) -> NoReturn:
    """Say how the run goes on, and end the process with the code of the signal."""
    name = SIGNALS.get(signal.Signals(ended.number), str(ended.number))
    if not is_first_process():
        sys.exit(128 + ended.number)
    goes_on = "the same command goes on"
    if requeue and ended.number == signal.SIGUSR1 and (queued := requeued()) is not None:
        goes_on = f"{queued}, and the same command goes on"
    if saved is not None:
        where = f" at step {saved}" + (f" of {steps}" if steps else "")
        log.warning("ended by %s%s: %s from %s", name, where, goes_on, run.last)
    elif run.started:
        log.warning("ended by %s before another step: %s from %s", name, goes_on, run.last)
    else:
        anew = goes_on.replace("goes on", "starts anew")
        log.warning("ended by %s: there is no checkpoint yet, and %s", name, anew)
    sys.exit(128 + ended.number)
