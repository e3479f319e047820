"""How weights follow their gradients: the settings that all that is trained here has in common."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from osp.checks import check_number
from osp.parallel import AdamW, Muon
from osp.training.resumed import own_settings

AnyOptimizer = TypeVar("AnyOptimizer", bound=torch.optim.Optimizer)


@dataclass(frozen=True)
class Optimisation:
    """Settings of `module.*`.

    `lr`, `weight_decay` and `betas` are AdamW's. The rates rise linearly over `warmup_steps`, and are constant then, or
    fall to 0 along half a cosine until step `decay_until`. A step takes `accumulate` batches. `ema_decay` is that of
    the averaged weights (EMA).

    Raises UsageError for values out of range.
    """

    lr: float = 1e-5
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_steps: int = 0
    decay_until: int | None = None
    accumulate: int = 1
    ema_decay: float = 0.9999

    def __post_init__(self) -> None:
        check_number("module.lr", self.lr, least=0)
        check_number("module.weight_decay", self.weight_decay, least=0)
        check_number("module.warmup_steps", self.warmup_steps, least=0, whole=True)
        check_number("module.decay_until", self.decay_until, least=1, whole=True, null="the rates stay")
        check_number("module.accumulate", self.accumulate, least=1, whole=True)
        check_number("module.ema_decay", self.ema_decay, least=0, below=1)

    def rate_at(self, step: int) -> float:
        """The learning rate as a part of its highest."""
        rising = min(1.0, (step + 1) / (self.warmup_steps + 1))
        if self.decay_until is None:
            return rising
        return rising * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.decay_until)))

    def adamw(self, parameters: Iterable[nn.Parameter], lr: float | None = None) -> torch.optim.AdamW:
        """An optimiser of those that learn, at `lr` or another rate."""
        learning = [parameter for parameter in parameters if parameter.requires_grad]
        rate, betas = self.lr if lr is None else lr, (self.betas[0], self.betas[1])
        return _restorable(AdamW(learning, rate, betas, weight_decay=self.weight_decay, fused=True))

    def with_muon(self, model: nn.Module, muon_lr: float) -> list[torch.optim.Optimizer]:
        """AdamW, and Muon (Jordan et al., 2024) for the matrices inside blocks.

        Its steps are scaled to the size of AdamW's (arXiv:2502.16982).
        """
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, parameter in model.named_parameters():
            inside = parameter.ndim == 2 and ".blocks." in name and name.endswith("weight")
            (matrices if inside else rest).append(parameter)
        muon = Muon(matrices, muon_lr, weight_decay=self.weight_decay, adjust_lr_fn="match_rms_adamw")
        return [self.adamw(rest), _restorable(muon)]


def _restorable(optimizer: AnyOptimizer) -> AnyOptimizer:
    """The optimiser, which takes the tensors of a state over and keeps the settings that it was made with."""
    optimizer.register_load_state_dict_pre_hook(own_settings)
    return optimizer
