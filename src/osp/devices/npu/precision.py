"""Mixed precision on NPUs: Lightning means CUDA's wherever it knows a device not by name, and then changes nothing."""

from typing import Literal

from lightning.pytorch.plugins.precision import MixedPrecision, Precision


class NPUMixedPrecision(MixedPrecision):
    """`bf16-mixed` or `16-mixed` by autocast for the NPU; the latter scales the loss."""

    def __init__(self, precision: Literal["16-mixed", "bf16-mixed"] = "bf16-mixed") -> None:
        super().__init__(precision, "npu")


def on_npu(precision: Precision) -> Precision:
    """The precision as it is, or, if it is mixed precision of another device, that of the NPU."""
    if isinstance(precision, MixedPrecision) and precision.device != "npu":
        return NPUMixedPrecision(precision.precision)  # type: ignore[arg-type]
    return precision
