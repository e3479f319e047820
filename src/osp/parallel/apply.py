"""The treatment of a model from outside, in one written order; a model itself knows nothing of processes.

1. **Sequence split**: the processes that share a clip each take a part of its tokens.
2. **Share norms**: norms over a batch see the clips of all processes.
3. **Recompute**: parts of the model keep only their inputs, and are computed again for the backward pass.
4. **Compile**: each part by itself.
5. **Shard**: each part's weights are split among the processes, and gathered when it runs; the rest, that lies in no
   part, is gathered when the model runs.

The parts are those that the model lists as `parts`: a denoiser its blocks, a VAE its levels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.export import register_dataclass
from torch.utils._pytree import SUPPORTED_NODES

from osp.denoiser import Denoiser
from osp.parallel.norms import share_norms
from osp.parallel.sequence import split_sequence

_ENTRANCES = ("encode", "decode")
"""Methods by which a model is called beside its forward pass."""


@runtime_checkable
class HasParts(Protocol):
    """A model that says what of it runs part by part."""

    @property
    def parts(self) -> Sequence[nn.Module]:
        """Modules that are called one after another in each pass, in that order."""
        ...


@dataclass(frozen=True)
class Sharding:
    """How weights are split: over a mesh of one dimension, or replicated over its first and split over its second.

    See `ShardedStrategy` for the rest.
    """

    mesh: DeviceMesh
    device: torch.device
    reshard_after_forward: bool = True
    prefetch: int = 1
    offload: bool = False

    def of(self, model: nn.Module) -> None:
        """Split the weights of a model without memory, and give this process memory for its parts."""
        parts = list(model.parts) if isinstance(model, HasParts) else []
        for part in parts:
            self._split(part)
        self._split(model)
        for method in _ENTRANCES:
            if hasattr(model, method):
                register_fsdp_forward_method(model, method)
        model.to_empty(device="cpu" if self.offload else self.device)
        if self.prefetch != 1:  # FSDP gathers one ahead by itself
            self._prefetch([part for part in parts if isinstance(part, FSDPModule)])

    def _prefetch(self, parts: list[FSDPModule]) -> None:
        for number, part in enumerate(parts):
            part.set_modules_to_forward_prefetch(parts[number + 1 : number + 1 + self.prefetch])
            part.set_modules_to_backward_prefetch(parts[max(0, number - self.prefetch) : number][::-1])

    def _split(self, module: nn.Module) -> None:
        module.register_forward_hook(open_results)  # before FSDP's own
        offload = CPUOffloadPolicy(pin_memory=self.mesh.device_type != "cpu") if self.offload else OffloadPolicy()
        fully_shard(module, mesh=self.mesh, reshard_after_forward=self.reshard_after_forward, offload_policy=offload)


def open_results(module: nn.Module, inputs: object, result: object) -> None:
    """A forward hook that lets torch look into the data classes of a result.

    FSDP gathers weights for the backward pass when a gradient comes to a tensor of the result, and before torch 2.12
    it finds none in a data class that torch does not know.
    """
    kind = type(result)
    if is_dataclass(kind):
        if kind not in SUPPORTED_NODES:
            register_dataclass(kind)
        for field in fields(kind):
            open_results(module, inputs, getattr(result, field.name))


@dataclass(frozen=True)
class Parallelism:
    """All that is applied to a model; see the module. Without anything the model stays as it is.

    `sequence` is the group of processes that share a clip's tokens. `recompute_every` is that of
    `Denoiser.recompute_every`, and so is `offload_activations`; both, and `compile`, are for denoisers.
    """

    processes: int = 1
    sequence: dist.ProcessGroup | None = None
    recompute_every: int = 0
    offload_activations: bool = False
    compile: bool = False
    sharding: Sharding | None = None


def apply(model: nn.Module, how: Parallelism) -> None:
    """Do to a model what `how` says, in the written order. One that is sharded comes without memory.

    Raises UsageError for a denoiser whose tokens cannot be split.
    """
    if how.processes > 1:
        share_norms(model)
    if isinstance(model, Denoiser):
        if how.sequence is not None:
            split_sequence(model, how.sequence)
        model.recompute_every, model.offload_activations = how.recompute_every, how.offload_activations
        if how.compile:
            model.compile_blocks()
    if how.sharding is not None:
        how.sharding.of(model)
