"""The speed of a run in its loggers: tokens and frames a second, MFU, memory, and the time of waiting for clips."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from osp.checks import check_number
from osp.denoiser import Denoiser
from osp.denoiser.flops import DenoiserFlops, denoiser_flops
from osp.devices import matmul_peak
from osp.devices.measure import peak_memory
from osp.errors import UsageError
from osp.training.denoiser_module import DenoiserModule
from osp.training.module import TrainingModule

log = logging.getLogger(__name__)

_GIB = 1 << 30


class Speed(Callback):
    """Logs as `perf/...`, at each `trainer.log_every_n_steps` steps, the means of the steps since the last time.

    - `frames_per_second`: frames of clips, of all processes; `tokens_per_second`: tokens of the denoiser.
    - `mfu`: operations of the denoiser's forward and backward pass (`osp.denoiser.flops`; the backward pass is about
      twice the forward one), by the time and `peak`. What is computed again by `module.recompute_every` does not count
      here; `hfu` counts it. VAE and text encoder count in neither.
    - `memory_gib`: the most memory that the first process has used at once: of its device, or the resident set.
    - `waiting`: the part of the time in which the first process waited for clips.

    Validations count nowhere.

    Args:
        peak: FLOP/s of one device; None: measured at the start, and on a CPU there is no MFU.

    Raises UsageError for a peak that is not above 0.
    """

    def __init__(self, peak: float | None = None) -> None:
        check_number("peak_flops", peak, above=0, null="measured")
        self.peak = peak
        self._flops: dict[tuple[int, ...], DenoiserFlops | None] = {}
        self._calls: list[tuple[int, ...]] = []  # shape of the latent, tokens of a text and images
        self._hook: Any = None
        self._since, self._waited, self._frames = time.monotonic(), 0.0, 0
        self._stopped: tuple[float, float] | None = None  # the time, and what was waited, when a validation began

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Take the time of waiting for clips."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        inner = data.waiting
        data.waiting = lambda: self._waiting(inner)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Start the clock, and note what the denoiser is called with."""
        if isinstance(pl_module, DenoiserModule) and self._hook is None:
            self._hook = pl_module.denoiser.register_forward_pre_hook(self._note, with_kwargs=True)
            device = trainer.strategy.root_device
            if self.peak is None and device.type != "cpu":
                self.peak = matmul_peak(device, _dtype(trainer.precision))
        self._begin()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the step, and log if it is time."""
        assert isinstance(pl_module, TrainingModule)
        self._frames += sum(_frames(one, pl_module) for one in batch[: pl_module.accumulate])
        if trainer.global_step % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        if trainer.is_global_zero and trainer.loggers:
            values = self._values(pl_module, time.monotonic() - self._since, trainer.strategy.root_device)
            for logger in trainer.loggers:
                logger.log_metrics({f"perf/{name}": value for name, value in values.items()}, trainer.global_step - 1)
        self._begin()

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """The clock stops."""
        self._stopped = time.monotonic(), self._waited

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """The clock goes on."""
        if self._stopped is not None:
            begun, self._waited = self._stopped
            self._since, self._stopped = self._since + time.monotonic() - begun, None

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Leave the denoiser as it was."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _begin(self) -> None:
        self._since, self._waited, self._frames, self._stopped = time.monotonic(), 0.0, 0, None
        self._calls.clear()

    def _values(self, module: TrainingModule, seconds: float, device: torch.device) -> dict[str, float]:
        mesh = module.mesh
        values = {
            "frames_per_second": self._frames * mesh.data / seconds,
            "waiting": min(1.0, self._waited / seconds),
            "memory_gib": peak_memory(device) / _GIB,
        }
        if not isinstance(module, DenoiserModule) or not self._calls:
            return values
        patch = module.denoiser.patch_size
        tokens = sum(b * t * (h // patch) * (w // patch) for b, _, t, h, w, *_ in self._calls)
        values["tokens_per_second"] = tokens * mesh.data / seconds
        counted = [self._count(module.denoiser, call) for call in self._calls]
        if self.peak is None or None in counted:
            return values
        possible = seconds * self.peak * mesh.sharing  # those that share a clip share its operations
        useful = sum(one.forward + one.backward for one in counted if one is not None)
        values["mfu"] = useful / possible
        if module.recompute_every:
            again = sum(one.forward - one.embedding for one in counted if one is not None) / module.recompute_every
            values["hfu"] = (useful + again) / possible
        return values

    def _count(self, model: Denoiser, call: tuple[int, ...]) -> DenoiserFlops | None:
        """The operations of a call; None for a family that does not say what its layers see."""
        if call not in self._flops:
            batch, _, *latent, text, images = call
            try:
                self._flops[call] = denoiser_flops(model, latent, text, batch, images)
            except UsageError as error:
                self._flops[call] = None
                log.info("no perf/mfu: %s", error)
        return self._flops[call]

    def _note(self, model: nn.Module, positional: Sequence[Any], named: Mapping[str, Any]) -> None:
        if torch.is_grad_enabled() and "text" in named:
            self._calls.append((*positional[0].shape, named["text"].shape[-2], named.get("images", 0)))

    @contextmanager
    def _waiting(self, inner: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
        begun = time.monotonic()
        with inner():
            yield
        self._waited += time.monotonic() - begun


def _frames(batch: Mapping[str, Any], module: TrainingModule) -> int:
    """The frames of a batch's clips, before the VAE."""
    if "video" in batch:
        return int(batch["video"].shape[0] * batch["video"].shape[2])
    clips, _, frames = batch["latent"].shape[:3]
    assert isinstance(module, DenoiserModule)
    return int(clips * ((frames - 1) * module.identity.latent["time_stride"] + 1))


def _dtype(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision.startswith("bf16") else torch.float32
