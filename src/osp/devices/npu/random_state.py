"""The state of random numbers on NPUs, of which Lightning's checkpoints hold nothing."""

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from .driver import driver


class NPURandomState(Callback):
    """Puts the generators of all processes' devices into checkpoints, and restores them when training goes on.

    All processes must take part in writing a checkpoint, as Lightning demands. A process that had no counterpart when
    the checkpoint was written, because more go on than there were, keeps the state that it has.
    """

    def __init__(self) -> None:
        self._to_restore: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        """The states of all processes, by rank."""
        mine = driver().get_rng_state(driver().current_device()).cpu()
        if not dist.is_initialized():
            return {"states": [mine]}
        states: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(states, mine)
        return {"states": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until training begins: what is drawn before that must not use them up."""
        self._to_restore = [state.cpu() for state in state_dict["states"]]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore this process's state."""
        if trainer.global_rank < len(self._to_restore):
            state = self._to_restore[trainer.global_rank]
            driver().set_rng_state(state.to(torch.uint8), driver().current_device())
        self._to_restore = []
