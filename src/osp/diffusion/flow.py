"""Rectified flow: straight paths from clean to noise, and times that lean towards noise (v1.5)."""

import math
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from osp.checks import check_number
from osp.diffusion.noise import Generators, draw_normal
from osp.diffusion.objective import Objective
from osp.errors import UsageError

# The model is given sigma times this.
TIME_SCALE = 1000.0
Sigma = TypeVar("Sigma", Tensor, np.ndarray)


@dataclass(frozen=True)
class Flow(Objective):
    """`(1 - sigma) * clean + sigma * noise`; `noise - clean` is predicted (arXiv 2209.03003); time is 1000 * sigma.

    Training draws sigma = sigmoid(normal) (arXiv 2403.03206) and shifts it: s * sigma / (1 + (s - 1) * sigma). `shift`
    is s; None: s = exp(m) with m linear in the tokens of a frame, from `low_shift` at `low_tokens` to `high_shift` at
    `high_tokens`, so that larger frames get more noise (report v1.5, FLUX). Raises UsageError for impossible values.
    """

    shift: float | None = None
    mean: float = 0.0
    std: float = 1.0
    low_tokens: int = 256
    high_tokens: int = 4096
    low_shift: float = 0.5
    high_shift: float = 1.15

    def __post_init__(self) -> None:
        check_number("objective: shift", self.shift, above=0, null="one by resolution")
        check_number("objective: std", self.std, 0)
        check_number("objective: low_tokens", self.low_tokens, below=self.high_tokens)

    @property
    def time_span(self) -> float:
        """1000, the time of pure noise."""
        return TIME_SCALE

    def shift_at(self, tokens: int | None = None) -> float:
        """The shift for frames of so many tokens. Raises UsageError if it depends on them and they are not given."""
        if self.shift is not None:
            return self.shift
        if tokens is None:
            raise UsageError("objective: shift=null takes the shift from the resolution; give tokens, or a shift")
        slope = (self.high_shift - self.low_shift) / (self.high_tokens - self.low_tokens)
        return math.exp(self.low_shift + slope * (tokens - self.low_tokens))

    def sample_time(self, batch: int, generators: Generators = None, tokens: int | None = None) -> Tensor:
        """1000 times the shifted sigma, `B` (float32)."""
        # This is computed in float64: float32's exponential takes different paths for one value and for several.
        drawn = draw_normal((batch,), generators).double()
        sigma = shifted(torch.sigmoid(self.mean + self.std * drawn), self.shift_at(tokens))
        return (TIME_SCALE * sigma).float()

    def levels(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Factors of the clean latent and of the noise: 1 - sigma and sigma."""
        sigma = time.float() / TIME_SCALE
        return 1 - sigma, sigma

    def target(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """The velocity along the path, noise - clean."""
        return (noise.float() - clean.float()).to(clean.dtype)

    def recover(self, noisy: Tensor, prediction: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """The clean latent and the noise that a prediction means."""
        alpha, sigma = self.along(time, noisy)
        x, v = noisy.float(), prediction.float()
        return (x - sigma * v).to(noisy.dtype), (x + alpha * v).to(noisy.dtype)

    def sigmas(self, steps: int, shift: float) -> np.ndarray:
        """The `steps + 1` sigmas that a sampler goes through, evenly spaced from 1 to 0 and shifted (float64)."""
        return shifted(np.linspace(1, 0, steps + 1), shift)


def shifted(sigma: Sigma, shift: float) -> Sigma:
    """Sigma as it is for `shift` times as many times more noise than signal."""
    return shift * sigma / (1 + (shift - 1) * sigma)
