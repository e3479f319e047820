"""A kernel on a device against the same in float64 on the CPU: its result, and the gradient of each input."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from osp.audit.doctor.result import Result, failed, passed
from osp.audit.doctor.subject import formats
from osp.audit.doctor.tolerance import Bar, bar_for

Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Kernel:
    """A kernel at one shape.

    Args:
        about: the shape, in words.
        run: the kernel, of the inputs on the device.
        formula: the same, of the inputs in float64 on the CPU.
        inputs: in float64 on the CPU; floats are rounded to the number format first, others go as they are.
        names: of the inputs that have gradients.
    """

    about: str
    run: Function
    formula: Function
    inputs: Sequence[Tensor | None]
    names: Sequence[str]
    convolution: bool = False


@dataclass(frozen=True)
class Difference:
    """The largest difference of an element of one tensor from the right one, as `osp.audit.doctor.tolerance` has it."""

    about: str
    value: float
    bar: Bar

    @property
    def share(self) -> float:
        """Of the bar; above 1 the kernel is wrong."""
        return self.value / self.bar.limit

    def __str__(self) -> str:
        return f"{self.about}: difference {self.value:.2g}, bar {self.bar.limit:.2g}"


def differences(kernel: Kernel, device: torch.device, dtype: torch.dtype) -> Iterator[Difference]:
    """Those of the result, then of the gradient of each input."""
    about = f"{kernel.about}, {str(dtype).removeprefix('torch.')}"
    bar = bar_for(dtype, device, convolution=kernel.convolution)
    rounded = [x.to(dtype) if x is not None and x.is_floating_point() else x for x in kernel.inputs]
    theirs = _with_gradients(kernel.formula, [None if x is None else _doubled(x) for x in rounded])
    ours = _with_gradients(kernel.run, [None if x is None else x.to(device) for x in rounded])
    for name, our, their in zip(("result", *kernel.names), ours, theirs, strict=True):
        what = name if name == "result" else f"gradient of {name}"
        yield Difference(f"{what} at {about}", _difference(our, their), bar)


def check_kernels(name: str, kernels: Iterable[Kernel], device: torch.device, mend: str) -> Result:
    """One line for a kernel at all its shapes and number formats; it names the worst difference."""
    found: list[Difference] = []
    refused: list[str] = []
    cases = 0
    for kernel in kernels:
        for dtype in formats(device):
            cases += 1
            try:
                found += differences(kernel, device, dtype)
            except Exception as error:  # noqa: BLE001  whatever a kernel or its compiler raises is the answer
                refused.append(f"{kernel.about}, {dtype}: {type(error).__name__}: {_first_line(error)}")
    wrong = sorted((one for one in found if not one.share <= 1), key=lambda one: -one.share)
    measured: dict[str, Any] = {
        "cases": cases,
        "wrong": [str(one) for one in wrong],
        "refused": refused,
        "worst_share_of_bar": max((one.share for one in found), default=None),
    }
    where = {"device": str(device), "measured": measured}
    if refused:
        return failed(name, f"{len(refused)} of {cases} cases are refused: {refused[0]}", mend, **where)
    if wrong:
        return failed(name, f"{len(wrong)} of {len(found)} tensors are wrong; the worst: {wrong[0]}", mend, **where)
    worst = max(found, key=lambda one: one.share)
    return passed(name, f"{cases} cases, forward and backward; the worst is {worst}", **where)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Normal values in float64, the same every time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _with_gradients(function: Function, inputs: Sequence[Tensor | None]) -> list[Tensor]:
    """The result, then the gradients of all inputs of floats for a drawn gradient of the result."""
    given = [x.requires_grad_() if x is not None and x.is_floating_point() else x for x in inputs]
    out = function(*given)
    rounded = drawn(*out.shape, seed=99).to(torch.bfloat16)  # so that it is the same in every number format
    learned = [x for x in given if x is not None and x.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, learned, rounded.to(out.device, out.dtype))]


def _doubled(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _difference(ours: Tensor, theirs: Tensor) -> float:
    usual = theirs.square().mean().sqrt().clamp_min(1e-30)
    apart = ((ours.cpu().double() - theirs).abs() / (usual + theirs.abs())).max()
    return float(apart) if torch.isfinite(apart) else math.inf


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")[:200]
