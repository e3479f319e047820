"""Where a run's numbers go, and how each kind of logger shows a clip: the one table of that."""

import importlib.util
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from lightning.fabric.loggers import TensorBoardLogger as FabricTensorBoard
from lightning.fabric.loggers.csv_logs import _ExperimentWriter as FabricExperimentWriter
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor

from osp.data.media.pictures import animated_gif
from osp.errors import DataError, UsageError
from osp.files import write_whole


class RunTensorBoard(TensorBoardLogger):
    """Lightning's logger for TensorBoard, without its empty hparams.yaml; the run's settings are in config.yaml."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write the numbers. Raises DataError naming the folder if the disk does not take them."""
        with _written(self.log_dir):
            super().log_metrics(metrics, step)

    def save(self) -> None:
        """Bring what was logged to the disk. Raises DataError as `log_metrics`."""
        with _written(self.log_dir):
            FabricTensorBoard.save(self)

    def finalize(self, status: str) -> None:
        """Close the files; where the run has failed, that is told and no more."""
        with suppress(OSError) if status == "failed" else _written(self.log_dir):
            super().finalize(status)


class RunTable(CSVLogger):
    """Lightning's logger for tables, without its empty hparams.yaml; the run's settings are in config.yaml."""

    def save(self) -> None:
        """Write the table. Raises DataError naming the folder if the disk does not take it."""
        if isinstance(table := self.experiment, FabricExperimentWriter):  # the first process has it, others a stand-in
            with _written(self.log_dir):
                FabricExperimentWriter.save(table)

    def finalize(self, status: str) -> None:
        """Write what is left; where the run has failed, that is told and no more."""
        with suppress(DataError) if status == "failed" else nullcontext():
            super().finalize(status)


@contextmanager
def _written(folder: str) -> Iterator[None]:
    """Raise what a disk does not take as DataError naming the folder; threads that write do not say it."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{error.filename or folder}: cannot be written ({error.strerror}); make room, and the same command goes "
            "on from the last checkpoint"
        ) from error


Show = Callable[[Any, str, Tensor, float, int], None]
"""Shows a clip in a logger: its name, uint8 `3 T H W`, frames a second, step."""


def shower(logger: Logger) -> Show | None:
    """The function that shows clips in a logger of this kind; None if it has no place for pictures."""
    return next((show for kind, show in _SHOW.items() if isinstance(logger, kind)), None)


def wandb_logger(**settings: Any) -> WandbLogger:
    """Lightning's logger for Weights & Biases. Raises UsageError where the package is not installed."""
    if importlib.util.find_spec("wandb") is None:
        raise UsageError(
            "logger=wandb needs the package wandb, which is not installed here; `pip install wandb`, or choose "
            "logger=tensorboard or logger=csv"
        )
    return WandbLogger(**settings)


def _show_in_tensorboard(logger: TensorBoardLogger, name: str, clip: Tensor, fps: float, step: int) -> None:
    image = Summary.Image(
        height=clip.shape[2], width=clip.shape[3], colorspace=3, encoded_image_string=animated_gif(clip, fps)
    )
    # The writer's own `add_video` needs moviepy for these few bytes.
    summary = Summary(value=[Summary.Value(tag=name, image=image)])
    logger.experiment._get_file_writer().add_summary(summary, step)


def _show_in_wandb(logger: WandbLogger, name: str, clip: Tensor, fps: float, step: int) -> None:
    logger.log_video(name, [io.BytesIO(animated_gif(clip, fps))], step, format=["gif"])


def _show_beside_table(logger: CSVLogger, name: str, clip: Tensor, fps: float, step: int) -> None:
    path = Path(logger.log_dir) / f"{name}_step_{step}.gif"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, animated_gif(clip, fps))


_SHOW: dict[type[Logger], Show] = {
    TensorBoardLogger: _show_in_tensorboard,
    WandbLogger: _show_in_wandb,
    CSVLogger: _show_beside_table,
}
