"""What a training run shows of itself."""

import logging
import time
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

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
        """Show the first batch's clips."""
        assert isinstance(pl_module, TrainingModule)
        if not trainer.is_global_zero or batch_idx or not self.clips:
            return
        places: list[tuple[Any, Show]] = [
            (logger, show) for logger in trainer.loggers if (show := shower(logger)) is not None
        ]
        if not places or (clips := pl_module.shown_clips(batch, outputs, self.clips)) is None:
            return
        for index, clip in enumerate(to_uint8(clips.cpu())):
            for logger, show in places:
                show(logger, f"val/clip_{index}", clip, float(batch["fps"][index]), trainer.global_step)


class ProgressLog(Callback):
    """A log line at each validation: where the run is, how fast, how well."""

    def __init__(self) -> None:
        self._since = (0, 0.0)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the clock."""
        self._since = (trainer.global_step, time.monotonic())

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Write the line."""
        if not trainer.is_global_zero:
            return
        step, now = trainer.global_step, time.monotonic()
        seconds = (now - self._since[1]) / max(1, step - self._since[0])
        self._since = (step, now)
        metrics = ", ".join(
            f"{name} {value:.3f}" for name, value in trainer.callback_metrics.items() if name.startswith("val/")
        )
        log.info("step %d of %d: %s (%.2f s a step)", step, trainer.max_steps, metrics, seconds)
