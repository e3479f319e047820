"""AdamW for weights of which each process holds some rows."""

from typing import Any

import torch
from torch import Tensor

from osp.parallel.shards import local


class AdamW(torch.optim.AdamW):
    """torch's AdamW, which moves each process's parts of the weights as plain tensors.

    No number of its step depends on another. Given sharded tensors, torch would work out how the results of all of them
    are to be sharded, which takes longer than the step itself.
    """

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        """Fill the lists of weights, gradients and states with this process's parts, which share their memory."""
        has_complex: bool = super()._init_group(group, *lists)
        for values in lists:
            values[:] = map(local, values)
        return has_complex
