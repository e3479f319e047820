"""Where a run's numbers and clips go: each kind of logger, several at once, and what is said where one cannot."""

import importlib.util
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from osp.errors import UsageError
from osp.training.callbacks import ClipPreview
from osp.training.loggers import shower, wandb_logger
from osp.training.module import TrainingModule

FRAMES = 3


class Shows(TrainingModule):
    """Makes two clips of any batch."""

    works_together = False

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)

    def shown_clips(self, batch: Any, outputs: Any, clips: int) -> Tensor:
        return torch.linspace(-1, 1, 2 * 3 * FRAMES * 16 * 16).reshape(2, 3, FRAMES, 16, 16)[:clips]


class Silent(Logger):
    """A logger without a place for clips."""

    name = version = "silent"

    def log_metrics(self, metrics: Any, step: int | None = None) -> None: ...

    def log_hyperparams(self, params: Any, *more: Any, **others: Any) -> None: ...


class Recorded(WandbLogger):
    """Lightning's logger without the package behind it."""

    def __init__(self) -> None:
        self.videos: list[tuple[str, bytes, int, str]] = []

    def log_video(self, key: str, videos: list[Any], step: int | None = None, **kwargs: Any) -> None:
        assert step is not None
        self.videos.append((key, videos[0].read(), step, kwargs["format"][0]))


def preview(*loggers: Logger, clips: int = 2) -> None:
    """A validation at step 7."""
    trainer: Any = SimpleNamespace(is_global_zero=True, loggers=list(loggers), global_step=7)
    callback = ClipPreview(clips)
    callback.on_fit_start(trainer, Shows())
    for number in range(2):
        callback.on_validation_batch_end(trainer, Shows(), None, {"fps": torch.full((2,), 8.0)}, number)


def test_clips_are_shown_in_every_logger_with_pictures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    board, table = TensorBoardLogger(tmp_path, name="", version="board"), CSVLogger(tmp_path, name="csv")
    web = Recorded()
    with caplog.at_level(logging.INFO):
        preview(board, table, web, Silent())
    board.experiment.flush()
    events = EventAccumulator(str(tmp_path / "board"), size_guidance={"images": 0})
    events.Reload()
    assert events.Tags()["images"] == ["val/clip_0", "val/clip_1"]
    (event,) = events.Images("val/clip_1")  # of the first batch only
    files = sorted(path.relative_to(table.log_dir).as_posix() for path in Path(table.log_dir).rglob("*.gif"))
    assert files == ["val/clip_0_step_7.gif", "val/clip_1_step_7.gif"]
    kept = (Path(table.log_dir) / files[1]).read_bytes()
    assert event.step == 7
    assert [(key, step, form) for key, _, step, form in web.videos] == [
        ("val/clip_0", 7, "gif"),
        ("val/clip_1", 7, "gif"),
    ]
    assert event.encoded_image_string == kept == web.videos[1][1]
    assert Image.open(Path(table.log_dir) / files[0]).n_frames == FRAMES  # type: ignore[attr-defined]
    assert caplog.messages == ["Silent shows no clips; logger=tensorboard does"]


def test_no_clips_are_made_where_none_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Shows, "shown_clips", lambda *args: pytest.fail("made for nothing"))
    preview(Silent())
    preview(CSVLogger(tmp_path), clips=0)
    assert shower(Silent()) is None
    with pytest.raises(UsageError, match="logged_clips=-1: must be a whole number of at least 0"):
        ClipPreview(-1)


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="the package is installed")
def test_a_missing_package_is_told_in_one_line() -> None:
    with pytest.raises(UsageError, match=r"^logger=wandb needs the package wandb.*`pip install wandb`[^\n]*$"):
        wandb_logger(project="osp")


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="the package is not installed")
def test_weights_and_biases_take_numbers_and_clips_offline(tmp_path: Path) -> None:
    logger = wandb_logger(save_dir=str(tmp_path), project="osp", offline=True)
    logger.log_metrics({"val/psnr": 1.0}, 7)
    preview(logger)
    logger.experiment.finish()
    assert list(tmp_path.rglob("*.gif"))
