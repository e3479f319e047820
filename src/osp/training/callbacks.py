"""What a training run shows of itself."""

import logging
import time
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.compat.proto.summary_pb2 import Summary

from osp.data.pictures import animated_gif
from osp.data.video import to_float, to_uint8

log = logging.getLogger(__name__)


class ClipLogger(Callback):
    """Shows the first clips of each validation in TensorBoard: input on the left, reconstruction on the right."""

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
        if batch_idx or not trainer.is_global_zero or not isinstance(trainer.logger, TensorBoardLogger):
            return
        pairs = torch.cat([to_float(batch["video"]), outputs], dim=-1)[: self.clips]
        for index, pair in enumerate(to_uint8(pairs.cpu())):
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
