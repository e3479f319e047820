"""Muon for matrices of which each process holds some rows."""

from typing import Any

import torch
from torch import Tensor, nn

from osp.parallel.pieces import is_sharded, read_like
from osp.parallel.shards import local, whole
from osp.weights.lazy import Stored


class Muon(torch.optim.Muon):
    """torch's Muon, also for matrices that are split.

    The direction of a step is made of the whole matrix: it is gathered, one matrix at a time, and every process makes
    the same direction and takes its rows. Momentum stays split.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of all matrices that have a gradient."""
        if not any(is_sharded(matrix) for group in self.param_groups for matrix in group["params"]):
            return super().step(closure)
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._step(matrix, group)
        return None

    def _step(self, matrix: nn.Parameter, group: dict[str, Any]) -> None:
        gradient, state = matrix.grad, self.state[matrix]
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum: Tensor = state["momentum_buffer"]
        momentum.lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        moved = read_like(matrix, Stored.of(_moved(whole(update), group)))
        local(matrix).mul_(1 - group["lr"] * group["weight_decay"]).add_(local(moved))


def _moved(update: Tensor, group: dict[str, Any]) -> Tensor:
    """By how much a step with this update moves a matrix, without decay of the weights."""
    moved = nn.Parameter(torch.zeros_like(update))
    moved.grad = update
    settings = {name: group[name] for name in ("lr", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")}
    torch.optim.Muon([moved], weight_decay=0.0, momentum=0.0, nesterov=False, **settings).step()
    return moved.detach()
