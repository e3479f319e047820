"""Lightning's strategies on NPUs: one device, DDP, and FSDP2 by way of ModelParallelStrategy.

Those for several devices do as Lightning's own on other devices, so that a strategy for all of them can be derived
from these.
"""

from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, StrategyRegistry
from torch.distributed.constants import default_pg_timeout
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from .driver import driver


class NPUSingleDeviceStrategy(SingleDeviceStrategy):
    """One NPU, the one of `Trainer(devices=...)`, or `npu:0`.

    Lightning's own choice for one device of an accelerator that it does not know is the CPU.
    """

    strategy_name = "npu"

    def __init__(self, device: str | torch.device | None = None, **parts: Any) -> None:
        driver()  # torch knows the name of the device only then
        super().__init__("npu:0" if device is None else device, **parts)
        self._is_given = device is not None

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """The device if it was given; otherwise the Trainer sets here those that it was told to take."""
        return [self.root_device] if self._is_given else None

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device]) -> None:
        if len(devices) != 1:
            raise MisconfigurationException(
                f"strategy='npu' is for one device, and {len(devices)} were asked for; take strategy='npu_ddp'"
            )
        self._root_device = devices[0]


class NPUDDPStrategy(DDPStrategy):
    """DDP over NPUs, with HCCL; on other devices Lightning's own DDP."""

    strategy_name = "npu_ddp"

    def setup_distributed(self) -> None:
        """Start the group of processes, unbound from its device on an NPU."""
        super().setup_distributed()
        unbind_default_group(self.root_device)

    def _setup_model(self, model: Module) -> DistributedDataParallel:
        if self.root_device.type != "npu":
            return super()._setup_model(model)
        with own_stream(self.root_device):  # Lightning's takes one of CUDA
            return DistributedDataParallel(model, device_ids=self.determine_ddp_device_ids(), **self._ddp_kwargs)


class NPUModelParallelStrategy(ModelParallelStrategy):
    """FSDP2 over NPUs, with HCCL: the module shards itself in `configure_model`, over `device_mesh["data_parallel"]`.

    All processes are data-parallel unless sizes are given; Lightning's own "auto" splits the tensors of all devices of
    a node instead, and then shards nothing. On other devices it is Lightning's own strategy, with that default.
    """

    strategy_name = "npu_fsdp2"

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: int = 1,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            data_parallel_size, tensor_parallel_size, save_distributed_checkpoint, process_group_backend, timeout
        )

    def _setup_distributed(self) -> None:
        super()._setup_distributed()
        unbind_default_group(self.root_device)
        if self._data_parallel_size == "auto":
            self._data_parallel_size = self.world_size // int(self._tensor_parallel_size)


def unbind_default_group(device: torch.device) -> None:
    """On an NPU, forget which device the default group of processes was made for.

    Lightning names one, and torch then makes further groups, such as those of a device mesh, by splitting the default
    group, which HCCL does not offer.
    """
    if device.type == "npu":
        dist.distributed_c10d._get_default_group().bound_device_id = None


def own_stream(device: torch.device) -> AbstractContextManager[Any]:
    """A stream of its own on an NPU: the one that DDP is to be built on."""
    return driver().stream(driver().Stream(device=device)) if device.type == "npu" else nullcontext()


def register_strategies() -> None:
    """Make the names known to Lightning."""
    for strategy, about in (
        (NPUSingleDeviceStrategy, "one Ascend NPU"),
        (NPUDDPStrategy, "DDP over Ascend NPUs"),
        (NPUModelParallelStrategy, "FSDP2 over Ascend NPUs"),
    ):
        if strategy.strategy_name not in StrategyRegistry:
            StrategyRegistry.register(strategy.strategy_name, strategy, description=about)
