"""How a process that reads clips hands its batches over: through shared memory, or a pipe where that is full."""

import logging
import signal
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger(__name__)

Batch = TypeVar("Batch")

_GRACE = 60  # seconds that a reader lives on after SIGTERM, so that the training can end its step

_told: set[str] = set()


@dataclass(frozen=True)
class _Piped:
    """A tensor as bytes, which go through the pipe of the queue."""

    data: np.ndarray
    dtype: torch.dtype
    shape: tuple[int, ...]


def begin_worker(number: int) -> None:
    """Leave signals that go to a whole group of processes to the training process, which ends its readers itself."""
    for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(ignored, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_later)


def _end_later(number: int, frame: FrameType | None) -> None:
    signal.alarm(_GRACE)


def sendable(batch: Batch) -> Batch:
    """The batch with its tensors in shared memory, or as bytes where there is no room for them in it.

    Left to the queue, a tensor without room would be lost in a thread, and the training would wait for ever.
    """
    return _mapped(batch, _shared)


def received(batch: Batch) -> Batch:
    """The batch with tensors where bytes came."""
    return _mapped(batch, _as_tensor)


def _mapped(value: Any, change: Any) -> Any:
    if isinstance(value, dict):
        return {key: _mapped(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_mapped(inner, change) for inner in value)
    return change(value)


def _shared(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    try:
        return value.share_memory_()
    except (RuntimeError, OSError):
        data = value.contiguous().reshape(-1).view(torch.uint8).numpy() if value.numel() else np.empty(0, np.uint8)
        return _Piped(data, value.dtype, tuple(value.shape))


def _as_tensor(value: Any) -> Any:
    if not isinstance(value, _Piped):
        return value
    if "pipe" not in _told:
        _told.add("pipe")
        log.warning(
            "shared memory (/dev/shm) has no room for the batches that are read ahead, so they come through pipes, "
            "which is slower; fewer data.workers, a smaller batch, or a larger /dev/shm (docker run --shm-size=8g) help"
        )
    if not value.data.size:
        return torch.empty(value.shape, dtype=value.dtype)
    return torch.from_numpy(value.data).view(value.dtype).reshape(value.shape)
