"""Throughput of training on NPUs."""

from typing import Any

from lightning.pytorch.callbacks import ThroughputMonitor

from .driver import driver


class NPUThroughputMonitor(ThroughputMonitor):
    """Lightning's monitor, which waits for the device before it looks at the clock, as its own does for CUDA alone.

    `available_flops` is the device's peak in FLOP/s, from which utilisation follows; Lightning knows none for NPUs.
    """

    def __init__(self, *arguments: Any, available_flops: float | None = None, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self._peak = available_flops

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """See `ThroughputMonitor`."""
        super().setup(trainer, pl_module, stage)
        self.available_flops = self._peak  # type: ignore[assignment]
        for throughput in self._throughputs.values():
            throughput.available_flops = self._peak

    def _update(self, *arguments: Any, **settings: Any) -> None:
        driver().synchronize()
        super()._update(*arguments, **settings)
