"""How far a kernel may be from float64: one bar for each number format, with its reason."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Bar:
    """The largest difference of an element, in units of its own size and the root mean square of all, together."""

    limit: float
    reason: str


BARS = {
    "float32": Bar(
        2e-4, "24 bits: a rounding is 6e-8; sums of thousands in any order, fast exponentials: 1e-5 is usual"
    ),
    "tf32": Bar(
        2e-2, "products of 11 bits (TF32 and its like): a rounding is 5e-4, the worst of thousands is 10 times it"
    ),
    "float16": Bar(3e-2, "11 bits: a rounding is 5e-4, before and after each product; 5e-3 is usual in attention"),
    "bfloat16": Bar(1.2e-1, "8 bits: a rounding is 4e-3, before and after each product; 4e-2 is usual in attention"),
}
"""A mask, a scale or an order that is wrong differs by nearly 1; the bars are three times what is usual, or more."""


def bar_for(dtype: torch.dtype, device: torch.device, *, convolution: bool = False) -> Bar:
    """The bar of a number format; accelerators compute convolutions of float32 with products of 11 bits by default."""
    if dtype is torch.float32 and convolution and device.type != "cpu":
        return BARS["tf32"]
    return BARS[str(dtype).removeprefix("torch.")]
