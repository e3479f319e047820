"""Which tokens of a clip lie in which process, block by block: arithmetic alone, nothing is sent."""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from osp.denoiser.grid import Grid
from osp.denoiser.patterns import Pattern

MOST_UNEVEN = 1.25  # tokens of a process to its share, up to which groups are kept whole


@dataclass(frozen=True)
class Layout:
    """The places of a grid's tokens in `ranks` processes.

    With a pattern, each of its groups lies whole in one process, and the tokens in the order of its groups. Without one
    they lie in their own order, cut into parts of one length, or nearly.
    """

    grid: Grid
    ranks: int
    pattern: Pattern | None = None

    @property
    def places(self) -> "Places":
        """All places, on the CPU."""
        return _places(self)

    def tokens(self, rank: int) -> Tensor:
        """The numbers of the tokens of a process, in the order in which they lie there."""
        return self.places.order.split(self.places.counts)[rank]


class Places(NamedTuple):
    """Tokens `order`, those of the first process first; how many of them, and how many groups, each process has."""

    order: Tensor
    counts: tuple[int, ...]
    groups: tuple[int, ...]


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # indices made in it could not serve a training step later
def _places(layout: Layout) -> Places:
    grid, ranks = layout.grid, layout.ranks
    if layout.pattern is None:
        ends = [grid.tokens * rank // ranks for rank in range(ranks + 1)]
        counts = tuple(end - start for start, end in pairwise(ends))
        return Places(torch.arange(grid.tokens, device="cpu"), counts, (0,) * ranks)
    groups = numbered_groups(layout.pattern, grid)
    sizes = (groups >= 0).sum(dim=1)
    # A group goes where its middle token falls, if all tokens in the groups' order are shared out evenly.
    middles = 2 * sizes.cumsum(0) - sizes
    owners = (middles * ranks // (2 * grid.tokens)).clamp(max=ranks - 1)
    held = torch.zeros(ranks, dtype=torch.long, device="cpu").index_add(0, owners, sizes)
    listed = tuple(torch.bincount(owners, minlength=ranks).tolist())
    return Places(groups[groups >= 0], tuple(held.tolist()), listed)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def numbered_groups(pattern: Pattern, grid: Grid) -> Tensor:
    """`G M`: the number of the token at each place of each group, -1 where there is none."""
    numbered = torch.arange(1, grid.tokens + 1, device="cpu")
    return pattern.arrange(numbered[None], grid)[0] - 1


def keeps_groups(pattern: Pattern, grid: Grid, ranks: int) -> bool:
    """Whether a pattern's groups can lie whole in the processes: each has some, and at most a quarter above its share.

    The share is of the tokens. Where it is not so, the attention is split by heads.
    """
    places = Layout(grid, ranks, pattern).places
    return min(places.counts) > 0 and max(places.counts) * ranks <= MOST_UNEVEN * grid.tokens


@lru_cache(maxsize=64)
def plan_layouts(schedule: tuple[Pattern, ...], grid: Grid, ranks: int) -> tuple[Layout, ...]:
    """The layout of each block: its own groups' if they can be whole, else that of the next block with such groups.

    After the last of those the layout stays. So blocks whose attention is split by heads cost no move of their own.
    """
    plain = Layout(grid, ranks)
    own = [replace(plain, pattern=p) if keeps_groups(p, grid, ranks) else None for p in schedule]
    layouts: list[Layout] = []
    last: Layout = next((one for one in reversed(own) if one is not None), plain)
    for one in reversed(own):
        last = last if one is None else one
        layouts.insert(0, last)
    return tuple(layouts)


class Move(NamedTuple):
    """How the tokens of one process go from one layout to another.

    `sends` are numbers of tokens among its own, those for the first process first; `given` and `taken` are how many go
    to each and come from each; `order` puts what comes into the new layout. `stays`: none leaves any process.
    """

    sends: Tensor
    given: tuple[int, ...]
    taken: tuple[int, ...]
    order: Tensor
    stays: bool


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def plan_move(before: Layout, after: Layout, rank: int, device: torch.device) -> Move:
    """The move of the tokens of process `rank`, whose indices lie on `device`."""
    ranks = before.ranks
    owner, _ = _owners(before)
    new_owner, new_place = _owners(after)
    mine, coming = before.tokens(rank), after.tokens(rank)
    # Those for one process go in the order of their places there, and come sorted by where they were.
    sends = (new_owner[mine] * len(owner) + new_place[mine]).argsort()
    arrives = owner[coming].argsort(stable=True)
    return Move(
        sends.to(device),
        tuple(torch.bincount(new_owner[mine], minlength=ranks).tolist()),
        tuple(torch.bincount(owner[coming], minlength=ranks).tolist()),
        arrives.argsort().to(device),
        torch.equal(owner, new_owner),
    )


def moved_tokens(before: Layout, after: Layout) -> int:
    """How many tokens change their process, over all processes."""
    return int((_owners(before)[0] != _owners(after)[0]).sum())


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _owners(layout: Layout) -> tuple[Tensor, Tensor]:
    """The process of each token, and its place there."""
    order, counts, _ = layout.places
    owner, place = torch.empty_like(order), torch.empty_like(order)
    owner[order] = torch.arange(layout.ranks, device="cpu").repeat_interleave(torch.tensor(counts, device="cpu"))
    place[order] = torch.cat([torch.arange(count, device="cpu") for count in counts])
    return owner, place
