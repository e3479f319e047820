"""The rows of a sharded tensor that one process holds, to be written and read by that process alone.

FSDP2 cuts a weight along its first dimension, as `torch.chunk` does: the first processes have ceil(rows / processes)
rows each, the last ones fewer or none.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from osp.weights.lazy import Stored


def is_sharded(value: object) -> bool:
    """Whether this is a tensor of which each process holds a part."""
    return isinstance(value, DTensor)


def own_rows(tensor: Tensor) -> tuple[Tensor, int] | None:
    """The rows of a sharded tensor that this process holds, in its memory, and the number of the first one.

    None where a process before this one holds the same ones (replicas). Raises NotImplementedError for a tensor that is
    not cut along its first dimension.
    """
    assert isinstance(tensor, DTensor)
    place = tensor.device_mesh.get_coordinate()
    assert place is not None
    if any(number and isinstance(one, Replicate) for one, number in zip(tensor.placements, place, strict=True)):
        return None
    return _local(tensor), _first_row(tensor)


@torch.no_grad()
def fill(tensor: Tensor, stored: Stored) -> None:
    """Read a stored tensor of the same shape into `tensor`: whole, or the rows of it that this process holds."""
    if isinstance(tensor, DTensor):
        local, begin = _local(tensor), _first_row(tensor)
        local.copy_(stored.rows(begin, begin + local.shape[0]))
    else:
        tensor.copy_(stored.read())


def read_like(tensor: Tensor, stored: Stored) -> Tensor:
    """A stored tensor in memory of its own, on the device of `tensor` of the same shape, and sharded if that is."""
    found = torch.empty_like(tensor, dtype=stored.dtype, requires_grad=False)
    fill(found, stored)
    return found


def is_finite_here(tensor: Tensor) -> bool:
    """Whether what this process holds of a tensor is neither NaN nor infinite."""
    own = _local(tensor) if isinstance(tensor, DTensor) else tensor
    return bool(torch.isfinite(own).all())


def _local(tensor: DTensor) -> Tensor:
    return cast(Tensor, cast(Any, tensor.detach()).to_local())


def _first_row(tensor: DTensor) -> int:
    """The number of the first row that this process holds."""
    mesh, place = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    assert place is not None
    rows = [-(-tensor.shape[0] // mesh.size(n)) * place[n] for n, one in enumerate(tensor.placements) if one.is_shard()]
    if any(type(one) is not Replicate and one != Shard(0) for one in tensor.placements) or len(rows) != 1:
        raise NotImplementedError(f"a tensor that is cut as {tensor.placements}")
    return int(min(tensor.shape[0], rows[0]))
