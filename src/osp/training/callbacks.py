"""What a training run shows of itself."""

import logging
import time
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto.summary_pb2 import Summary

from osp.data.media.pictures import animated_gif
from osp.data.media.video import to_uint8
from osp.training.module import TrainingModule

log = logging.getLogger(__name__)


class ClipLogger(Callback):
    """Shows clips of each validation in TensorBoard: what the module makes of the first batch (`shown_clips`)."""

    def __init__(self, clips: int = 4) -> None:
        self.clips = clips

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Log the first batch's clips."""
        assert isinstance(pl_module, TrainingModule)
        first = trainer.is_global_zero and not batch_idx
        if not first or not self.clips or not isinstance(trainer.logger, TensorBoardLogger):
            return
        if (clips := pl_module.shown_clips(batch, outputs, self.clips)) is None:
            return
        for index, pair in enumerate(to_uint8(clips.cpu())):
            fps = float(batch["fps"][index])
            image = Summary.Image(
                height=pair.shape[2], width=pair.shape[3], colorspace=3, encoded_image_string=animated_gif(pair, fps)
            )
            # The writer's own `add_video` needs moviepy for these few bytes.
            summary = Summary(value=[Summary.Value(tag=f"val/clip_{index}", image=image)])
            trainer.logger.experiment._get_file_writer().add_summary(summary, trainer.global_step)


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
