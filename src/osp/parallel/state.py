"""How the state of a run whose weights are split among processes becomes a checkpoint, and is taken from one."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.strategies.strategy import Strategy
from torch import Tensor
from torch.optim import Optimizer

from osp.parallel.shards import whole


class StateInParts(Strategy):
    """The side of a strategy that split weights make different; it stands before the strategy that splits them.

    Each process gives the writer of checkpoints the parts that it holds, if that wants them so (`in_pieces`); else the
    first process gives it everything whole, on the CPU. When one is read, the module and its optimisers have taken
    their parts of it already (`osp.training.resumed`).
    """

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning hands over the optimisers' states as with any other strategy."""
        return True

    @property
    def _in_pieces(self) -> bool:
        return bool(getattr(self.checkpoint_io, "in_pieces", False))  # others than ours write whole states

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The weights: parts of them, or whole ones in the first process alone, for which the others take part."""
        assert self.lightning_module is not None
        return self._of_process(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of an optimiser, as `lightning_module_state_dict`."""
        return self._of_process(getattr(optimizer, "optimizer", optimizer).state_dict())

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write it by all processes, or by the first one while the others wait."""
        if self._in_pieces or self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """The content of a checkpoint, whose tensors are still to be read, or those of the whole model."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take over this process's parts of the weights."""
        Strategy.load_model_state_dict(self, checkpoint, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take over this process's parts of the optimisers' states."""
        Strategy.load_optimizer_state_dict(self, checkpoint)

    def teardown(self) -> None:
        """Let the writer of checkpoints end as well."""
        super().teardown()
        self.checkpoint_io.teardown()

    def _of_process(self, state: Any) -> Any:
        return state if self._in_pieces else self._gathered(state)

    def _gathered(self, state: Any) -> Any:
        """A state with its tensors whole on the CPU; empty on other processes than the first."""
        if isinstance(state, Mapping):
            gathered = {key: self._gathered(value) for key, value in state.items()}
            return gathered if self.is_global_zero else {}
        if isinstance(state, Tensor):
            value = whole(state.detach())
            return value.cpu() if self.is_global_zero else None
        return state
