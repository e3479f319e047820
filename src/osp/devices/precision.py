"""The number formats of compute, by Lightning's names, so that evaluation, sampling and training share the setting."""

from collections.abc import Mapping

import torch

from osp.checks import check_choice

AUTOCAST: Mapping[str, torch.dtype | None] = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def autocast_dtype(precision: str) -> torch.dtype | None:
    """The number format that a name in AUTOCAST computes in; None for float32. Raises UsageError for another name."""
    if precision not in AUTOCAST:  # what is auto has been decided by now
        check_choice("precision", precision, [*AUTOCAST, "auto"])
    return AUTOCAST[precision]


def choose_precision(precision: str, device: torch.device) -> str:
    """One of AUTOCAST: that of the name, for `auto` what is fast on the device. Raises UsageError for another name."""
    chosen = fast_precision(device) if precision == "auto" else precision
    autocast_dtype(chosen)
    return chosen


def fast_precision(device: torch.device) -> str:
    """`bf16-mixed` where the device multiplies bfloat16 in hardware, as GPUs and CPUs with AMX do, else `32-true`."""
    if device.type == "cuda":
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    if device.type == "cpu":
        # `get_capabilities` is not used, since torch 2.9 may not have it.
        return "bf16-mixed" if torch.cpu._is_amx_tile_supported() else "32-true"
    return "bf16-mixed"
