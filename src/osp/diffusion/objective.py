"""Objectives: what a denoiser learns to predict, along which path from clean to noise; and their names."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from osp.checks import check_choice
from osp.diffusion.loss import squared_error
from osp.diffusion.noise import Generators, draw_normal
from osp.errors import UsageError
from osp.extensions import import_named


@dataclass(frozen=True)
class Objective(ABC):
    """A path `alpha * clean + sigma * noise` and what is predicted on it.

    `time` (`B`) is always what the model is given: the discrete step, or 1000 * sigma for a flow. Latents are
    `B C T H W`; all is computed in float32, and results have the clean (or noisy) latent's type.
    """

    @property
    @abstractmethod
    def time_span(self) -> float:
        """Times lie between 0 and this."""

    def time_at(self, part: Tensor) -> Tensor:
        """The time that lies at this part of the span, 0 to 1, `B`: to measure at chosen times."""
        return part * self.time_span

    @abstractmethod
    def sample_time(self, batch: int, generators: Generators = None, tokens: int | None = None) -> Tensor:
        """Times to train at, `B`, on the generators' device (else the CPU).

        A list of generators gives each sample a time of its own, whatever the batch. `tokens` is the number of tokens
        of one frame, for times that depend on the resolution.
        """

    @abstractmethod
    def levels(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Time `B` -> how much is clean and how much is noise, alpha and sigma, both `B` in float32."""

    @abstractmethod
    def target(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """The target of the model's prediction."""

    def toward(self, clean: Tensor, noisy: Tensor, time: Tensor) -> Tensor:
        """The target at a noisy latent that is to become `clean`; the noise level must not be 0."""
        alpha, sigma = self.along(time, noisy)
        return self.target(clean, (noisy.float() - alpha * clean.float()) / sigma, time)

    @abstractmethod
    def recover(self, noisy: Tensor, prediction: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """The clean latent and the noise that a prediction means."""

    def draw_noise(
        self, shape: Sequence[int], generators: Generators = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """The noise of training, of `shape` (batch first) in float32, from generators as in `draw_normal`."""
        return draw_normal(shape, generators, device)

    def weight(self, time: Tensor) -> Tensor:
        """How much a sample's squared error counts, `B` in float32."""
        return torch.ones_like(time, dtype=torch.float32)

    def prediction_channels(self, channels: int) -> int:
        """How many channels a model predicts for latents of so many."""
        return channels

    def predicted(self, output: Tensor) -> Tensor:
        """The part of a model's output that predicts the target, `B C T H W`; all of it, unless a variance is learned.

        Sampling takes nothing else.
        """
        return output

    def error(
        self, output: Tensor, clean: Tensor, noise: Tensor, time: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Each sample's weighted error, and how many values it has, both `B`; see `squared_error`."""
        return squared_error(output, self.target(clean, noise, time), self.weight(time), mask)

    def check_channels(self, channels: int, out_channels: int) -> None:
        """Raise UsageError unless a denoiser of latents of `channels` predicts as many as this objective learns."""
        wanted = self.prediction_channels(channels)
        if out_channels == wanted:
            return
        mend = (
            ", or choose an objective with a learned variance, such as ddpm_v10" if out_channels == 2 * wanted else ""
        )
        raise UsageError(
            f"denoiser.out_channels={out_channels}: {self._told} of denoiser.channels={channels} predicts {wanted} "
            f"channels; set denoiser.out_channels={wanted}{mend}"
        )

    @property
    def _told(self) -> str:
        """The objective in a message."""
        return type(self).__name__

    def corrupt(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """The noisy latent that the model is given."""
        alpha, sigma = self.along(time, clean)
        return (alpha * clean.float() + sigma * noise.float()).to(clean.dtype)

    def along(self, time: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
        """The levels of `time` on the latent's device, shaped to multiply it."""
        shape = (-1, *[1] * (latent.ndim - 1))
        alpha, sigma = self.levels(time.to(latent.device))
        return alpha.view(shape), sigma.view(shape)


_OBJECTIVES: dict[str, type[Objective]] = {}


def register_objective(kind: type[Objective]) -> None:
    """Let checkpoints name this class, so that `osp sample` finds what a denoiser was trained to predict.

    The class is a frozen dataclass, whose fields are its settings. A module that is run again may register its class
    again. Raises UsageError for a name that is taken.
    """
    known = _OBJECTIVES.get(kind.__name__)
    if known is not None and known.__module__ != kind.__module__:
        raise UsageError(f"register_objective: there is another objective {kind.__name__}; choose another name")
    _OBJECTIVES[kind.__name__] = kind


def find_objective(name: Any) -> type[Objective]:
    """The class that a checkpoint names. Raises UsageError for a name that nobody has registered."""
    if name not in [*_OBJECTIVES]:
        import_named()
    check_choice("objective", name, _OBJECTIVES)
    return _OBJECTIVES[name]
