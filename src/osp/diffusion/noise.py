"""Random numbers that depend on a sample's own seed, not on the batch, the device or the number of processes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from osp.errors import UsageError

# One generator for the whole batch, one for each sample, or None: then torch's own state is used.
Generators = torch.Generator | Sequence[torch.Generator] | None


def draw_normal(shape: Sequence[int], generators: Generators = None, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal noise of `shape` (batch first) in float32, drawn where the generators live, moved to `device`.

    With a list, each sample is drawn from its own generator, so that it gets the same bytes in any batch. Raises
    UsageError if their number is not the batch size.
    """
    if generators is None:
        return torch.randn(tuple(shape), device=device)
    if isinstance(generators, torch.Generator):
        return torch.randn(tuple(shape), generator=generators, device=generators.device).to(device)
    check_generators(generators, shape[0])
    return torch.stack([torch.randn(tuple(shape[1:]), generator=g, device=g.device) for g in generators]).to(device)


def draw_integers(end: int, batch: int, generators: Generators = None) -> Tensor:
    """Whole numbers from 0 to `end - 1`, all as likely, `B` (int64), from the generators as in `draw_normal`."""
    if generators is None:
        return torch.randint(end, (batch,))
    if isinstance(generators, torch.Generator):
        return torch.randint(end, (batch,), generator=generators, device=generators.device)
    check_generators(generators, batch)
    return torch.cat([torch.randint(end, (1,), generator=g, device=g.device) for g in generators])


def check_generators(generators: Sequence[torch.Generator], batch: int) -> None:
    """Raise UsageError unless there is one for each sample."""
    if len(generators) != batch:
        raise UsageError(f"{len(generators)} random generators do not fit a batch of {batch}; give one for each sample")
