"""Tensors of which each process holds a part, and the part of a process."""

from typing import Any, cast

from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, which shares its memory; the tensor itself where it is not split."""
    return cast(Tensor, cast(Any, tensor).to_local()) if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, which all processes that hold parts of it ask for at once; itself where it is not split."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
