"""What hardware there is, how to choose it, and how fast it is and how much memory it takes."""

from osp.devices.attention import attention
from osp.devices.device import choose_device, describe_device, fast_precision, free_unused, synchronize
from osp.devices.measure import PeakMemory, count_flops, matmul_peak

__all__ = [
    "PeakMemory",
    "attention",
    "choose_device",
    "count_flops",
    "describe_device",
    "fast_precision",
    "free_unused",
    "matmul_peak",
    "synchronize",
]
