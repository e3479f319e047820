"""Lightning's strategies for several processes, which also say how many of them share a clip."""

from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from osp.checks import check_number
from osp.devices.npu import NPUDDPStrategy, NPUModelParallelStrategy
from osp.errors import UsageError
from osp.parallel.apply import Sharding
from osp.parallel.state import StateInParts


class ReplicatedStrategy(NPUDDPStrategy):
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


class ShardedStrategy(StateInParts, NPUModelParallelStrategy):
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
            self.root_device,
            reshard_after_forward=self.reshard_after_forward,
            prefetch=self.prefetch,
            offload=self.offload_optimizer,
        )


def _sequence_group(sequence: int, device: str) -> dist.ProcessGroup | None:
    """The group of the processes that share this one's clip; None if there is no other."""
    if sequence == 1:
        return None
    sizes = (dist.get_world_size() // sequence, sequence)
    return init_device_mesh(device, sizes, mesh_dim_names=("data", "sequence"))["sequence"].get_group()
