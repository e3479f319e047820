"""Lightning's strategies for several processes, which also say how many of them share a clip."""

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer

from osp.checks import check_number
from osp.errors import UsageError
from osp.parallel.apply import Sharding
from osp.parallel.shards import split, whole


class ReplicatedStrategy(DDPStrategy):
    """Every process has the whole model, and gradients are averaged (DDP).

    Weights that get no gradient in a step are allowed: VAE and discriminator take turns, and not every denoiser reads
    pooled text. `sequence` neighbouring processes share a clip's tokens; `options` are those of Lightning's
    `DDPStrategy`. Raises UsageError for less than one process.
    """

    def __init__(self, sequence: int = 1, **options: Any) -> None:
        check_number("trainer.strategy.sequence", sequence, least=1, whole=True)
        super().__init__(**{"find_unused_parameters": True} | options)
        self.sequence = sequence
        self.sequence_group: dist.ProcessGroup | None = None
        self.sharding: Sharding | None = None

    def setup_environment(self) -> None:
        """Find the other processes, and those that share a clip with this one."""
        super().setup_environment()
        self.sequence_group = _sequence_group(self.sequence, self.root_device.type)


class ShardedStrategy(ModelParallelStrategy):
    """Every process keeps a part of each weight, gradient and state of the optimiser (FSDP2).

    A part of the model, such as a transformer's block, is gathered before it runs. Weights, gradients and what is
    added up of them stay float32, and `precision=bf16-mixed` is autocast as on one device, so that norms, modulation
    and gated residuals are computed as there.

    Args:
        sequence: so many neighbouring processes share a clip's tokens. They hold parts of the weights like all others.
        replicas: whole copies of the model among all processes, each sharded over its part of them, which are
            neighbours; None: one a node.
        reshard_after_forward: give up what was gathered after the forward pass, and gather it again for the backward
            pass; false is faster and takes the memory of all gathered parts.
        prefetch: parts that are gathered while the ones before them run.
        offload_optimizer: keep weights, gradients and states of optimisers in the memory of the CPU, where the
            optimisers then run.
        options: those of Lightning's `ModelParallelStrategy`.

    Raises UsageError for values out of range, and before training for replicas that the processes cannot be split into.
    """

    def __init__(
        self,
        sequence: int = 1,
        replicas: int | None = None,
        reshard_after_forward: bool = True,
        prefetch: int = 1,
        offload_optimizer: bool = False,
        **options: Any,
    ) -> None:
        check_number("trainer.strategy.sequence", sequence, least=1, whole=True)
        check_number("trainer.strategy.replicas", replicas, least=1, whole=True, null="one a node")
        check_number("trainer.strategy.prefetch", prefetch, least=0, whole=True)
        super().__init__(**options)
        self.sequence, self.replicas = sequence, replicas
        self.reshard_after_forward, self.prefetch = reshard_after_forward, prefetch
        self.offload_optimizer = offload_optimizer
        self.sequence_group: dist.ProcessGroup | None = None
        self.sharding: Sharding | None = None

    def setup_environment(self) -> None:
        """Find the other processes, those that share a clip with this one, and those that share weights."""
        self._setup_distributed()
        device, replicas = self.root_device.type, self.num_nodes if self.replicas is None else self.replicas
        if self.world_size % replicas:
            raise UsageError(
                f"trainer.strategy.replicas={replicas}: must divide the {self.world_size} processes of the run"
            )
        sizes = (replicas, self.world_size // replicas)
        self._device_mesh = init_device_mesh(device, sizes, mesh_dim_names=("replicate", "shard"))
        assert self.lightning_module is not None
        self.lightning_module._device_mesh = self._device_mesh
        self.sequence_group = _sequence_group(self.sequence, device)
        self.sharding = Sharding(
            self._device_mesh if replicas > 1 else self._device_mesh["shard"],
            reshard_after_forward=self.reshard_after_forward,
            prefetch=self.prefetch,
            offload=self.offload_optimizer,
        )

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning hands over the optimisers' states as with any other strategy."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole weights, on the CPU of the first process; the others, which take part, get none."""
        assert self.lightning_module is not None
        return self._gathered(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state of an optimiser, as `lightning_module_state_dict`."""
        inner = getattr(optimizer, "optimizer", optimizer)
        return self._gathered(inner.state_dict())

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write it by the first process; the others wait."""
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)
        self.barrier()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """The content of a checkpoint, whose tensors are those of the whole model."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take over this process's parts of the weights."""
        assert self.lightning_module is not None
        ours, stored = self.lightning_module.state_dict(), checkpoint["state_dict"]
        parts = {key: _split_like(value, ours.get(key)) for key, value in stored.items()}
        self.lightning_module.load_state_dict(parts, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take over this process's parts of the optimisers' states."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            parameters = [one for group in optimizer.param_groups for one in group["params"]]
            parts = {
                number: {key: _split_like(value, parameters[number]) for key, value in entries.items()}
                for number, entries in state["state"].items()
            }
            optimizer.load_state_dict(dict(state) | {"state": parts})

    def _gathered(self, state: Any) -> Any:
        """A state with its tensors whole on the CPU; empty on other processes than the first."""
        if isinstance(state, Mapping):
            gathered = {key: self._gathered(value) for key, value in state.items()}
            return gathered if self.is_global_zero else {}
        if isinstance(state, Tensor):
            value = whole(state.detach())
            return value.cpu() if self.is_global_zero else None
        return state


def _split_like(value: Any, like: Any) -> Any:
    """A value of a state, whose tensors are split like the weight that they belong to."""
    fits = isinstance(value, Tensor) and isinstance(like, Tensor) and value.shape == like.shape
    return split(value, like) if fits else value


def _sequence_group(sequence: int, device: str) -> dist.ProcessGroup | None:
    """The group of the processes that share this one's clip; None if there is no other."""
    if sequence == 1:
        return None
    sizes = (dist.get_world_size() // sequence, sequence)
    return init_device_mesh(device, sizes, mesh_dim_names=("data", "sequence"))["sequence"].get_group()
