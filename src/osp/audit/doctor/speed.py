"""How fast each device multiplies and moves memory, and whether one is far slower than its neighbours."""

import time
from collections.abc import Iterator, Mapping
from statistics import median

import torch

from osp.audit.doctor.result import Result, passed, warning
from osp.audit.doctor.subject import Subject, formats
from osp.devices import autocast_dtype, fast_precision, matmul_peak, synchronize
from osp.devices.measure import copy_rate
from osp.vae.layers import CausalConv3d

_SECONDS = 0.3  # of each measurement
_SLOW = 0.8  # of the neighbours' median
_MEND = "look for heat, a lower power limit or clock, another program on it, or a slower slot"


def check_speed(subject: Subject) -> Iterator[Result]:
    """A line for each device: products of matrices in each number format, a convolution, and copies in its memory."""
    yield from compared({str(device): rates(device) for device in subject.devices})


def rates(device: torch.device) -> dict[str, float]:
    """FLOP/s of products by number format and of a convolution, and bytes/s of copies."""
    measured = {str(dtype).removeprefix("torch."): matmul_peak(device, dtype, _SECONDS) for dtype in formats(device)}
    return measured | {"convolution": convolution_rate(device), "memory": copy_rate(device, _SECONDS)}


@torch.no_grad()
def convolution_rate(device: torch.device) -> float:
    """FLOP/s of a 3x3x3 convolution as in a VAE, in the format that the device is fast in, the best of some runs.

    Where a device stores clips in a form of its own, this is far below its rate of products.
    """
    channels, side = (32, 32) if device.type == "cpu" else (128, 128)
    dtype = autocast_dtype(fast_precision(device)) or torch.float32
    layer = CausalConv3d(channels, channels, (3, 3, 3)).to(device, dtype)
    clip = torch.ones(1, channels, 5, side, side, device=device, dtype=dtype)
    took = []
    for _ in range(4):
        synchronize(device)
        begun = time.perf_counter()
        layer(clip)
        synchronize(device)
        took.append(time.perf_counter() - begun)
    return 2 * layer.weight.numel() * 5 * side**2 / min(took)


def compared(measured: Mapping[str, Mapping[str, float]]) -> Iterator[Result]:
    """The rates of each device as a line, which warns if one is far below the median of all."""
    for device, own in measured.items():
        told = ", ".join(f"{_said(key, rate)}" for key, rate in own.items())
        shares = {key: rate / median(other[key] for other in measured.values()) for key, rate in own.items()}
        slow = [f"{share:.0%} of its neighbours in {key}" for key, share in shares.items() if share < _SLOW]
        if slow:
            yield warning("speed.peak", f"{told}; {', '.join(slow)}", _MEND, device=device, measured=own)
        else:
            yield passed("speed.peak", told, device=device, measured=own)


def _said(key: str, rate: float) -> str:
    if key == "memory":
        return f"{rate / 1e9:.3g} GB/s in memory"
    return f"{rate / 1e12:.3g} TFLOP/s in {'a ' if key == 'convolution' else ''}{key}"
