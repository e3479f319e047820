"""The way from a sample to a denoiser's loss."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from osp.conditioning import ConditionInputs, EncodedText, call_denoiser, denoiser_inputs
from osp.denoiser import Denoiser
from osp.diffusion import Objective
from osp.training.joint import joint_inputs

TIME_PARTS = 4
"""The loss is also logged for each of so many equal parts of the times, from little noise to much."""


@dataclass(frozen=True)
class Noised:
    """A batch as a denoiser meets it, a row a sample: `clean` and `noise` `B C T H W`, `times` `B`, and conditions.

    In a joint batch the last `images` frames of each sample are images; see `osp.training.joint`.
    """

    clean: Tensor
    noise: Tensor
    times: Tensor
    text: EncodedText
    condition: ConditionInputs | None = None
    images: int = 0

    def error(self, denoiser: Denoiser, objective: Objective) -> tuple[Tensor, Tensor]:
        """Each sample's error by the objective, and how many values it has, both `B`."""
        noisy = objective.corrupt(self.clean, self.noise, self.times)
        inputs: dict[str, Any] = denoiser_inputs(denoiser, self.text, self.condition)
        if self.images:
            inputs |= joint_inputs(self.text, len(self.clean), self.images)
        prediction = call_denoiser(denoiser, noisy, self.times, **inputs)
        return objective.error(prediction, self.clean, self.noise, self.times)


class StepErrors:
    """Errors and values of a step's samples, summed by the part of the times that each was drawn in."""

    def __init__(self, objective: Objective, device: torch.device) -> None:
        self.objective = objective
        self.sums = torch.zeros(2, TIME_PARTS, device=device)

    def add(self, times: Tensor, errors: Tensor, counted: Tensor) -> None:
        """Take in a batch."""
        parts = (times.float() / self.objective.time_span * TIME_PARTS).long().clamp(0, TIME_PARTS - 1)
        self.sums[0].index_add_(0, parts, errors.detach())
        self.sums[1].index_add_(0, parts, counted)


def mean_errors(sums: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The loss of a step, and that of each part of the times with any sample, of sums over all processes."""
    by_part = {f"loss_time_{i}": sums[0, i] / n for i, n in enumerate(sums[1].tolist()) if n}
    return sums[0].sum() / sums[1].sum(), by_part
