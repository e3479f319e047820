"""The groups of a pattern that lie in one process, as a pattern of that process's tokens."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from osp.denoiser.grid import Grid
from osp.denoiser.patterns import Pattern
from osp.denoiser.patterns.arrangement import Run, Split
from osp.parallel.sequence_layout import Layout, numbered_groups


@dataclass(frozen=True, eq=False)
class LocalGroups(Pattern):
    """Groups `first` to `last` of a pattern, whose tokens lie one after another: it arranges these tokens alone.

    `slots` are the places that hold tokens, counted through all of its groups; None: all do.
    """

    whole: Pattern
    first: int
    last: int
    made: Split
    slots: Tensor | None

    def split(self, grid: Grid) -> Split:
        """So many groups one after another."""
        return self.made

    def arrange(self, tokens: Tensor, grid: Grid) -> Tensor:
        """See `Pattern`, for the tokens of this process."""
        if self.slots is not None:
            empty = tokens.new_zeros(len(tokens), *self.made.padded, *tokens.shape[2:])
            tokens = empty.index_copy(1, self.slots, tokens)
        return tokens.unflatten(1, self.made.shape)

    def restore(self, groups: Tensor, grid: Grid) -> Tensor:
        """See `Pattern`, for the tokens of this process."""
        tokens = groups.flatten(1, 2)
        return tokens if self.slots is None else tokens.index_select(1, self.slots)

    def runs(self, grid: Grid) -> tuple[Run, ...]:
        """See `Pattern`: the runs of the whole pattern, as far as they are here."""
        cut = []
        for run in self.whole.runs(grid):
            start, stop = max(run.start, self.first), min(run.stop, self.last)
            if start < stop:
                real = None if run.real is None else run.real[start - run.start : stop - run.start]
                cut.append(Run(start - self.first, stop - self.first, run.length, real))
        return tuple(cut)


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # indices made in it could not serve a training step later
def local_groups(layout: Layout, rank: int, device: torch.device) -> LocalGroups:
    """The groups of a layout's pattern that lie in process `rank`, for tokens on `device`."""
    assert layout.pattern is not None
    _, counts, groups = layout.places
    first, last = sum(groups[:rank]), sum(groups[: rank + 1])
    tokens = numbered_groups(layout.pattern, layout.grid)[first:last]
    split = Split((counts[rank],), (tokens.numel(),), tuple(tokens.shape), (0,))
    slots = None if counts[rank] == tokens.numel() else (tokens >= 0).flatten().nonzero()[:, 0].to(device)
    return LocalGroups(layout.pattern, first, last, split, slots)
