"""Diffusion in discrete steps: the model predicts the noise (v1.0 to v1.2) or the velocity (v1.3)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from osp.checks import check_number
from osp.diffusion.noise import Generators, draw_integers, draw_normal
from osp.diffusion.objective import Objective
from osp.diffusion.variational import bound_tables, variational_bits
from osp.errors import UsageError


@dataclass(frozen=True)
class Discrete(Objective):
    """`steps` levels of noise with linear betas (DDPM, arXiv 2006.11239); time is the step, from 0 to `steps - 1`.

    `min_snr` limits the weight of steps with little noise (arXiv 2303.09556); None: all steps count the same. In
    training the noise has `offset_noise` times a normal number added, one for each channel of a sample, so that the
    mean of a latent is learned too. Raises UsageError for betas that make no schedule.
    """

    steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    min_snr: float | None = None
    offset_noise: float = 0.0

    def __post_init__(self) -> None:
        check_number("objective: steps", self.steps, 2, whole=True)
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise UsageError(
                f"objective: beta_start={self.beta_start}, beta_end={self.beta_end}: must rise within 0 and 1"
            )
        check_number("objective: min_snr", self.min_snr, above=0, null="no weights")
        check_number("objective: offset_noise", self.offset_noise, 0)

    @property
    def zero_snr(self) -> bool:
        """Whether nothing of the clean latent is left at the last step."""
        return False

    @property
    def alphas_cumprod(self) -> Tensor:
        """alpha^2 at each step, in float64."""
        return _alphas_cumprod(self.steps, self.beta_start, self.beta_end, self.zero_snr)

    @property
    def betas(self) -> Tensor:
        """The noise that each step adds, in float64."""
        kept = self.alphas_cumprod
        return 1 - kept / torch.cat([kept.new_ones(1), kept[:-1]])

    @property
    def time_span(self) -> float:
        """The number of steps."""
        return float(self.steps)

    def time_at(self, part: Tensor) -> Tensor:
        """The step that lies there (int64)."""
        return super().time_at(part).long().clamp(max=self.steps - 1)

    def sample_time(self, batch: int, generators: Generators = None, tokens: int | None = None) -> Tensor:
        """Steps, all as likely, `B` (int64)."""
        return draw_integers(self.steps, batch, generators)

    def levels(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma of each step; their squares sum to 1.

        Between two steps, where some solvers call the model, sigma / alpha follows a line, as it does there.
        """
        table = _levels(self.steps, self.beta_start, self.beta_end, self.zero_snr, time.device)
        alpha, sigma = table[:, time.long()]
        if not time.is_floating_point():
            return alpha, sigma
        part = (time - time.floor()).float()
        after = table[:, (time.long() + 1).clamp(max=self.steps - 1)]
        # The last step of a schedule down to pure noise counts as the solvers have it, with 2^-12 of signal.
        ratio, next_ratio = sigma / alpha, after[1] / after[0].clamp(min=2**-12)
        between = ratio + part * (next_ratio - ratio)
        scale = (1 + between.square()).rsqrt()
        whole = part == 0
        return alpha.where(whole, scale), sigma.where(whole, scale * between)

    def draw_noise(
        self, shape: Sequence[int], generators: Generators = None, device: torch.device | str = "cpu"
    ) -> Tensor:
        """See `Objective.draw_noise`; after it each generator gives as many numbers as there are channels."""
        noise = super().draw_noise(shape, generators, device)
        if not self.offset_noise:
            return noise
        offset = draw_normal((*shape[:2], *[1] * (len(shape) - 2)), generators, device)
        return noise + self.offset_noise * offset

    def clipped_snr(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """The ratio of signal to noise, and the same limited to `min_snr`, `B` in float32."""
        alpha, sigma = self.levels(time)
        snr = alpha.square() / sigma.square()
        return snr, snr.clamp(max=math.inf if self.min_snr is None else self.min_snr)


@dataclass(frozen=True)
class Epsilon(Discrete):
    """The noise is predicted. With `min_snr`, the weight is min(snr, min_snr) / snr.

    With `learned_variance` the model predicts as many channels again, which place the variance of the step before
    between its bounds (arXiv 2102.09672): v1.0 and v1.1. The variational bound of these is added to the squared error,
    neither weighted nor scaled down, as published.
    """

    learned_variance: bool = False

    def prediction_channels(self, channels: int) -> int:
        """As many as the latent has, and as many again for a learned variance."""
        return 2 * channels if self.learned_variance else channels

    def predicted(self, output: Tensor) -> Tensor:
        """The noise in a model's output, without the variance."""
        return output.chunk(2, dim=1)[0] if self.learned_variance else output

    def error(
        self, output: Tensor, clean: Tensor, noise: Tensor, time: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See `Objective.error`; with a learned variance the mask does not reduce the number of values (v1.1)."""
        errors, values = super().error(self.predicted(output), clean, noise, time, mask)
        if not self.learned_variance:
            return errors, values
        tables = _bound_tables(self.steps, self.beta_start, self.beta_end, time.device)
        bits = variational_bits(tables, output, clean, noise, time)
        if mask is not None:
            bits = bits * mask.to(bits)[:, None]
        return errors + bits.flatten(1).sum(1), torch.full_like(values, clean[0].numel())

    @property
    def _told(self) -> str:
        return "Epsilon with learned_variance" if self.learned_variance else super()._told

    def target(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """The noise, which is what the model should predict."""
        return noise.to(clean.dtype)

    def recover(self, noisy: Tensor, prediction: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """The clean latent and the noise that a prediction means."""
        alpha, sigma = self.along(time, noisy)
        clean = (noisy.float() - sigma * prediction.float()) / alpha
        return clean.to(noisy.dtype), prediction.to(noisy.dtype)

    def weight(self, time: Tensor) -> Tensor:
        """1, or that of `min_snr`."""
        if self.min_snr is None:
            return super().weight(time)
        snr, clipped = self.clipped_snr(time)
        return clipped / snr


@dataclass(frozen=True)
class Velocity(Discrete):
    """`alpha * noise - sigma * clean` is predicted (arXiv 2202.00512): v1.3, with its defaults.

    `zero_terminal_snr` stretches the schedule so that its last step is pure noise (arXiv 2305.08891, algorithm 1).
    With `min_snr`, the weight is min(snr, min_snr) / (snr + 1), which is 0 at that step, as published.
    """

    min_snr: float | None = 5.0
    zero_terminal_snr: bool = True

    @property
    def zero_snr(self) -> bool:
        """Whether nothing of the clean latent is left at the last step."""
        return self.zero_terminal_snr

    def target(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """The velocity, which is what the model should predict: alpha x noise - sigma x clean."""
        alpha, sigma = self.along(time, clean)
        return (alpha * noise.float() - sigma * clean.float()).to(clean.dtype)

    def recover(self, noisy: Tensor, prediction: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """The clean latent and the noise that a prediction means."""
        alpha, sigma = self.along(time, noisy)
        x, v = noisy.float(), prediction.float()
        return (alpha * x - sigma * v).to(noisy.dtype), (sigma * x + alpha * v).to(noisy.dtype)

    def weight(self, time: Tensor) -> Tensor:
        """1, or that of `min_snr`."""
        if self.min_snr is None:
            return super().weight(time)
        snr, clipped = self.clipped_snr(time)
        return clipped / (snr + 1)


@cache
def _alphas_cumprod(steps: int, start: float, end: float, zero_snr: bool) -> Tensor:
    kept = (1 - torch.linspace(start, end, steps, dtype=torch.float64)).cumprod(0)
    if not zero_snr:
        return kept
    alpha = kept.sqrt()
    first, last = alpha[0], alpha[-1]
    return ((alpha - last) * (first / (first - last))).square()


@cache
def _levels(steps: int, start: float, end: float, zero_snr: bool, device: torch.device) -> Tensor:
    """Alpha and sigma, `2 steps`, in float32; one copy a device."""
    kept = _alphas_cumprod(steps, start, end, zero_snr)
    return torch.stack([kept.sqrt(), (1 - kept).sqrt()]).float().to(device)


@cache
def _bound_tables(steps: int, start: float, end: float, device: torch.device) -> Tensor:
    return bound_tables(_alphas_cumprod(steps, start, end, False)).to(device)
