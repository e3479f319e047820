"""Tensors of which each process holds a part, and the part of a process."""

from typing import Any, cast

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, which shares its memory; the tensor itself where it is not split."""
    return cast(Tensor, cast(Any, tensor).to_local()) if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, which all processes that hold parts of it ask for at once; itself where it is not split."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def piece(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, split as `like` is; a view. All of it where that is not split."""
    if not isinstance(like, DTensor):
        return value
    mesh = like.device_mesh
    for dimension, placement in enumerate(like.placements):
        if isinstance(placement, Shard):
            pieces = value.chunk(mesh.size(dimension), placement.dim)
            rank = mesh.get_local_rank(dimension)
            value = pieces[rank] if rank < len(pieces) else value.narrow(placement.dim, 0, 0)
    return value


def split(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which all processes have -> the tensor split as `like` is, on its device."""
    if not isinstance(like, DTensor):
        return value
    own = piece(value, like).to(like.device, copy=True)
    return DTensor.from_local(
        own, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
