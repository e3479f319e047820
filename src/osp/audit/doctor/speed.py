"""How fast each device multiplies and moves memory, and whether one is far slower than its neighbours."""

from collections.abc import Iterator, Mapping
from statistics import median

import torch

from osp.audit.doctor.result import Result, passed, warning
from osp.audit.doctor.subject import Subject, formats
from osp.devices import matmul_peak
from osp.devices.measure import copy_rate

_SECONDS = 0.3  # of each measurement
_SLOW = 0.8  # of the neighbours' median
_MEND = "look for heat, a lower power limit or clock, another program on it, or a slower slot"


def check_speed(subject: Subject) -> Iterator[Result]:
    """A line for each device: products of matrices in each number format, and copies in its memory."""
    yield from compared({str(device): rates(device) for device in subject.devices})


def rates(device: torch.device) -> dict[str, float]:
    """FLOP/s by number format, and bytes/s of copies."""
    measured = {str(dtype).removeprefix("torch."): matmul_peak(device, dtype, _SECONDS) for dtype in formats(device)}
    return measured | {"memory": copy_rate(device, _SECONDS)}


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
    return f"{rate / 1e9:.3g} GB/s in memory" if key == "memory" else f"{rate / 1e12:.3g} TFLOP/s in {key}"
