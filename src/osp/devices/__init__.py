"""The hardware: the choice of a device, its speed and its memory."""

from osp.devices.attention import attention
from osp.devices.device import accelerator_device, choose_device, describe_device, free_unused, synchronize
from osp.devices.kernels import choose_kernels, chosen_kernels
from osp.devices.measure import PeakMemory, count_flops, matmul_peak
from osp.devices.precision import AUTOCAST, autocast_dtype, choose_precision, fast_precision

__all__ = [
    "AUTOCAST",
    "PeakMemory",
    "accelerator_device",
    "attention",
    "autocast_dtype",
    "choose_device",
    "choose_kernels",
    "choose_precision",
    "chosen_kernels",
    "count_flops",
    "describe_device",
    "fast_precision",
    "free_unused",
    "matmul_peak",
    "synchronize",
]
