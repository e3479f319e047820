"""AdamW for weights of which each process holds some rows."""

from typing import Any

import torch
from torch import Tensor

from osp.parallel.shards import local


class AdamW(torch.optim.AdamW):
    """torch's AdamW, which moves each process's parts of the weights as plain tensors.

    No number of its step depends on another. Given sharded tensors, torch first works out how the results of all of
    them are to be sharded: for 500 weights on a CPU 1.8 s in the first step, and 13 ms a step later instead of 6.
    """

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        """Fill the lists of weights, gradients and states with this process's parts, which share their memory."""
        has_complex: bool = super()._init_group(group, *lists)
        for values in lists:
            values[:] = map(local, values)
        return has_complex
