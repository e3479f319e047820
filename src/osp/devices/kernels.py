"""The choice between torch's own operators and a vendor's fused ones."""

import os

import torch

from osp.checks import check_choice

VARIABLE = "OSP_KERNELS"
"""The environment variable with the choice, for this process and those that it starts."""

KERNELS = ("plain", "fused")

_chosen = os.environ.get(VARIABLE, KERNELS[0])


def choose_kernels(name: str) -> None:
    """`plain`: torch's operators; `fused`: on NPUs Ascend's own attention, RMSNorm and rotary positions.

    Raises UsageError for another name. On CPU and CUDA both are the same.
    """
    global _chosen
    check_choice("kernels", name, KERNELS)
    _chosen = os.environ[VARIABLE] = name


def chosen_kernels() -> str:
    """The choice, one of `KERNELS`."""
    return _chosen


def are_fused(device: torch.device) -> bool:
    """Whether Ascend's fused operators compute on this device."""
    return device.type == "npu" and _chosen == "fused"
