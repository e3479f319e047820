"""The costs of a computation: operations, memory, and the device's best rate to compare its speed with."""

import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch
from torch.utils.flop_counter import FlopCounterMode

from osp.devices.device import backend, free_unused, synchronize

_PROCESS = Path("/proc/self")


class PeakMemory:
    """The most memory, in bytes, that was in use at once during the block.

    On an accelerator that is what torch's allocator has handed out on `device`. On the CPU it is the resident set of
    the process: everything, torch and Python themselves included. Memory that was freed before the block is given back
    to the system first, so that it does not count.

    After the block `peak` is that number and `before` what was in use when the block began; `peak - before` is what
    the block itself took. `how` says how it was measured. Where the system tells only the peak since the process began
    (neither Linux nor an accelerator), `before` is None.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.peak = 0
        self.before: int | None = None
        self._gauge: _Gauge = _gauge(device)
        self.how = self._gauge.how

    def __enter__(self) -> "PeakMemory":
        free_unused(self.device)
        self.before = self._gauge.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.peak = self._gauge.stop()

    @property
    def taken(self) -> int | None:
        """The bytes that the block took beyond those in use before it; None if that is not known."""
        return None if self.before is None else max(0, self.peak - self.before)


def peak_memory(device: torch.device) -> int:
    """The most bytes in use at once so far: what torch's allocator has handed out on an accelerator, or the resident
    set of the process."""
    if device.type != "cpu":
        return int(backend(device).max_memory_allocated(device))
    return _SinceStart().stop()


class _Gauge(Protocol):
    how: str

    def start(self) -> int | None: ...

    def stop(self) -> int: ...


def _gauge(device: torch.device) -> _Gauge:
    if device.type != "cpu":
        return _Allocator(device)
    if not (_PROCESS / "statm").exists():
        return _SinceStart()
    return _HighWaterMark() if _can_reset() else _Samples()


class _Allocator:
    how = "torch's allocator"

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def start(self) -> int:
        synchronize(self._device)
        backend(self._device).reset_peak_memory_stats(self._device)
        return int(backend(self._device).memory_allocated(self._device))

    def stop(self) -> int:
        synchronize(self._device)
        return int(backend(self._device).max_memory_allocated(self._device))


class _HighWaterMark:
    """The kernel's own record of the largest resident set, reset first (man 5 proc_pid_clear_refs)."""

    how = "the largest resident set of the process"

    def start(self) -> int:
        (_PROCESS / "clear_refs").write_text("5")
        return _status("VmRSS")

    def stop(self) -> int:
        return _status("VmHWM")


class _Samples:
    """The resident set, looked at every millisecond, for systems whose record cannot be reset."""

    how = "the resident set of the process, sampled every millisecond"

    def start(self) -> int:
        self._done = threading.Event()
        self._largest = before = _resident()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return before

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return max(self._largest, _resident())

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self._largest = max(self._largest, _resident())


class _SinceStart:
    how = "the largest resident set since the process began"

    def start(self) -> None:
        return None

    def stop(self) -> int:
        import resource  # Windows has none

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _can_reset() -> bool:
    """Whether the kernel lets us reset its record, and does: some sandboxes take the order and ignore it."""
    try:
        (_PROCESS / "clear_refs").write_text("5")
        return _status("VmHWM") <= _status("VmRSS") + (16 << 20)
    except (OSError, KeyError):
        return False


def _status(key: str) -> int:
    for line in (_PROCESS / "status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def _resident() -> int:
    return int((_PROCESS / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def available_memory(device: torch.device) -> int | None:
    """Bytes that are free on an accelerator or, for the CPU, in the machine and its container; None: not known."""
    if device.type != "cpu":
        return int(backend(device).mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
        if limit.exists() and (most := limit.read_text().strip()) != "max":
            free = min(free, int(most) - int(used.read_text()))
    except (OSError, StopIteration, ValueError):
        return None
    return free


def count_flops(function: Callable[..., Any], *inputs: torch.Tensor) -> int:
    """Operations of the convolutions, matrix products and attentions of a call, a multiply-add being two.

    Put the function's module and its inputs on the meta device, and nothing is computed.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(*inputs)
    return int(counter.get_total_flops())


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """The best rate of a product of square matrices, in FLOP/s, found within about so many seconds.

    On CUDA float32 means TF32 where cuDNN may use it, as it may by default: that is what convolutions then run in.
    """
    sides = (512, 1024, 2048, 4096) if device.type == "cpu" else (2048, 4096, 8192)
    best = 0.0
    with torch.no_grad(), _as_convolutions(device):
        for side in sides:
            flops = 2 * side**3
            if best and flops / best > seconds / 4:
                break  # a slow device has shown its best with smaller ones
            a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
            out = a @ b
            end = time.perf_counter() + seconds / len(sides)
            took = math.inf
            while took == math.inf or time.perf_counter() < end:
                synchronize(device)
                begun = time.perf_counter()
                torch.matmul(a, b, out=out)
                synchronize(device)
                took = min(took, time.perf_counter() - begun)
            best = max(best, flops / took)
    return best


def copy_rate(device: torch.device, seconds: float = 0.5) -> float:
    """The best rate of a copy within the device's memory, in bytes read and written a second."""
    source = torch.ones((64 if device.type == "cpu" else 512) << 20, dtype=torch.uint8, device=device)
    target = source.clone()  # and not empty memory, which the system gives only when it is written to
    end, took = time.perf_counter() + seconds, math.inf
    while took == math.inf or time.perf_counter() < end:
        synchronize(device)
        begun = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        took = min(took, time.perf_counter() - begun)
    return 2 * source.numel() / took


@contextmanager
def _as_convolutions(device: torch.device) -> Iterator[None]:
    """Products of float32 matrices as precise as the convolutions."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    if device.type == "cuda":
        matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        matmul.allow_tf32 = before
