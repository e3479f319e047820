"""The callbacks that show a training run: clips of its validations, log lines, and the bar of its steps."""

import logging
import sys
import time
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from osp.checks import check_number
from osp.data.media.video import to_uint8
from osp.training.loggers import Show, shower
from osp.training.module import TrainingModule

log = logging.getLogger(__name__)


class ClipPreview(Callback):
    """Shows clips of each validation in every logger that can: what the module makes of the first batch.

    `clips` is the most of them (`TrainingModule.shown_clips`); 0 shows none. Raises UsageError for less.
    """

    def __init__(self, clips: int = 4) -> None:
        check_number("logged_clips", clips, least=0, whole=True)
        self.clips = clips

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Say which loggers have no place for clips."""
        for logger in trainer.loggers:
            if self.clips and shower(logger) is None:
                log.info("%s shows no clips; logger=tensorboard does", type(logger).__name__)

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show the clips of the first process's first batch."""
        assert isinstance(pl_module, TrainingModule)
        if batch_idx or not self.clips:
            return
        places: list[tuple[Any, Show]] = [
            (logger, show) for logger in trainer.loggers if (show := shower(logger)) is not None
        ]
        if pl_module.works_together:  # the first process's model runs only if all of them run it
            batch = trainer.strategy.broadcast(batch)
        elif not trainer.is_global_zero:
            return
        if not places or (clips := pl_module.shown_clips(batch, outputs, self.clips)) is None:
            return
        if not trainer.is_global_zero:
            return
        for index, clip in enumerate(to_uint8(clips.cpu())):
            for logger, show in places:
                show(logger, f"val/clip_{index}", clip, float(batch["fps"][index]), trainer.global_step)


class ProgressLog(Callback):
    """Log lines: at each validation where the run is, how fast and how well; without a terminal also now and then.

    `every` is how many seconds lie between two lines where there is no terminal, which has a bar (`StepsBar`).
    """

    def __init__(self, every: float = 30.0) -> None:
        check_number("callbacks.progress.every", every, above=0)
        self.every = every
        self._since = (0, 0.0)  # the step and the time of the last validation
        self._told = 0.0
        self._clips = 0  # since the last line

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the clock."""
        self._since = (trainer.global_step, time.monotonic())
        self._told, self._clips = self._since[1], 0

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write a line if it is time."""
        assert isinstance(pl_module, TrainingModule)
        self._clips += sum(len(one["sample"]) for one in batch) * pl_module.mesh.data
        now = time.monotonic()
        if not trainer.is_global_zero or sys.stderr.isatty() or now - self._told < self.every:
            return
        step, (since, begun) = trainer.global_step, self._since
        left = (now - begun) / max(1, step - since) * (trainer.max_steps - step)
        loss = float(trainer.callback_metrics.get("train/loss", float("nan")))
        speed = self._clips / (now - self._told)
        log.info(
            "step %d of %d: loss %.4f, %.3g clips a second, about %s left",
            step,
            trainer.max_steps,
            loss,
            speed,
            _time(left),
        )
        self._told, self._clips = now, 0

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the line."""
        if not trainer.is_global_zero:
            return
        step, now = trainer.global_step, time.monotonic()
        seconds = (now - self._since[1]) / max(1, step - self._since[0])
        self._since = (step, now)
        self._told, self._clips = now, 0
        metrics = ", ".join(
            f"{name} {value:.3f}" for name, value in trainer.callback_metrics.items() if name.startswith("val/")
        )
        log.info("step %d of %d: %s (%.2f s a step)", step, trainer.max_steps, metrics, seconds)


class StepsBar(Callback):
    """A bar on a terminal: steps done of `trainer.max_steps`, the loss, and the time left."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._moved: list[logging.StreamHandler[Any]] = []

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Show it."""
        if not trainer.is_global_zero or not sys.stderr.isatty():
            return
        done, loss = MofNCompleteColumn(), TextColumn("{task.fields[loss]}")
        columns = TextColumn("{task.description}"), BarColumn(), done, loss, TimeElapsedColumn(), TimeRemainingColumn()
        self._bar = Progress(*columns, console=Console(stderr=True))
        before = sys.stderr
        self._task = self._bar.add_task("step", total=trainer.max_steps, completed=trainer.global_step, loss="")
        self._bar.start()
        for handler in logging.getLogger().handlers:  # or log lines would run into the bar
            if isinstance(handler, logging.StreamHandler) and handler.stream is before:
                handler.setStream(sys.stderr)
                self._moved.append(handler)

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        """Move it."""
        if self._bar is not None:
            loss = float(trainer.callback_metrics.get("train/loss", float("nan")))
            self._bar.update(self._task, completed=trainer.global_step, loss=f"loss {loss:.4f}")

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Say what takes the time."""
        if self._bar is not None:
            self._bar.update(self._task, description="validation, step")

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Training goes on."""
        if self._bar is not None:
            self._bar.update(self._task, description="step")

    def on_exception(self, trainer: lightning.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Leave the terminal as it was."""
        self._close()

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Leave the terminal as it was."""
        self._close()

    def _close(self) -> None:
        if self._bar is None:
            return
        self._bar.stop()
        self._bar = None
        for handler in self._moved:
            handler.setStream(sys.stderr)
        self._moved = []


def _time(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
