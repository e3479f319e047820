"""Ascend NPUs for Lightning: accelerator, strategies, precision, random state and fused operators.

Importing the package registers the accelerator `npu` and the strategies `npu`, `npu_ddp` and `npu_fsdp2`. It needs
torch, Lightning and torch-npu, and nothing else of the project that it lies in, so that the folder can be copied into
any other. Lightning's own stack runs on these devices with

    Trainer(accelerator="npu", devices=2, strategy="npu_ddp", precision="bf16-mixed")
"""

from importlib.util import find_spec

from .driver import device_count, driver, is_available, missing  # first: it says why torch itself cannot be imported

# isort: split
from .operators import fused_attention, fused_rms_norm, fused_rotary

__all__ = ["device_count", "driver", "fused_attention", "fused_rms_norm", "fused_rotary", "is_available", "missing"]

# Sampling, for one, goes without Lightning.
if find_spec("lightning") is not None:
    from lightning.pytorch.accelerators import AcceleratorRegistry

    from .accelerator import NPUAccelerator
    from .precision import NPUMixedPrecision
    from .random_state import NPURandomState
    from .strategies import (
        NPUDDPStrategy,
        NPUModelParallelStrategy,
        NPUSingleDeviceStrategy,
        register_strategies,
    )
    from .throughput import NPUThroughputMonitor

    __all__ += ["NPUAccelerator", "NPUDDPStrategy", "NPUMixedPrecision", "NPUModelParallelStrategy", "NPURandomState"]
    __all__ += ["NPUSingleDeviceStrategy", "NPUThroughputMonitor"]

    NPUAccelerator.register_accelerators(AcceleratorRegistry)
    register_strategies()
