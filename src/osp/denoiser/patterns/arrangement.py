"""Attention patterns: tokens are gathered into groups, attend inside each group, and are scattered back.

A pattern is a permutation with padding. It sees the tokens as one or more axes, fills these up to sizes that can be
divided, splits them into factors, and takes some of the factors as the number of the group and the others, in their
order, as the place in it.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from osp.checks import check_number
from osp.denoiser.grid import Grid


class Split(NamedTuple):
    """How a pattern sees a grid.

    `axes` are its sizes, `padded` those after filling up, `factors` those after splitting, and `groups` says which of
    the factors number the group.
    """

    axes: tuple[int, ...]
    padded: tuple[int, ...]
    factors: tuple[int, ...]
    groups: tuple[int, ...]

    @property
    def order(self) -> tuple[int, ...]:
        """The factors, those of the group first."""
        return (*self.groups, *(i for i in range(len(self.factors)) if i not in self.groups))

    @property
    def shape(self) -> tuple[int, int]:
        """The number of groups, and of places in each."""
        groups = math.prod([self.factors[i] for i in self.groups])
        return groups, math.prod(self.factors) // groups


class Run(NamedTuple):
    """Groups `start` to `stop`, of whose places the first `length` are needed.

    `real` (`G M`) says which of those hold tokens; None: all.
    """

    start: int
    stop: int
    length: int
    real: Tensor | None


@dataclass(frozen=True)
class Pattern:
    """The base of all patterns; each of them says how it splits a grid."""

    def split(self, grid: Grid) -> Split:
        """How the pattern sees the grid."""
        raise NotImplementedError

    def arrange(self, tokens: Tensor, grid: Grid) -> Tensor:
        """`B N ...` -> `B G M ...`, zeros where there is no token; a view of the tokens where that is possible."""
        split = self.split(grid)
        x = tokens
        if split.padded != split.axes:
            x = x.unflatten(1, split.axes)
            ends = [(0, after - before) for before, after in zip(split.axes, split.padded, strict=True)]
            after_axes = [0, 0] * (tokens.ndim - 2)
            x = F.pad(x, [*after_axes, *(side for pair in reversed(ends) for side in pair)])
            x = x.flatten(1, len(split.axes))
        if not split.groups:
            return x.unsqueeze(1)
        x = x.unflatten(1, split.factors)
        rest = range(1 + len(split.factors), x.ndim)
        return x.permute(0, *(1 + i for i in split.order), *rest).reshape(len(tokens), *split.shape, *tokens.shape[2:])

    def restore(self, groups: Tensor, grid: Grid) -> Tensor:
        """`B G M ...` -> `B N ...`: the inverse of `arrange`."""
        split = self.split(grid)
        x = groups.flatten(1, 2).unflatten(1, [split.factors[i] for i in split.order])
        back = sorted(range(len(split.order)), key=lambda i: split.order[i])
        rest = range(1 + len(split.factors), x.ndim)
        x = x.permute(0, *(1 + i for i in back), *rest)
        x = x.reshape(len(groups), *split.padded, *groups.shape[3:])
        for axis, size in enumerate(split.axes, start=1):
            x = x.narrow(axis, 0, size)
        return x.flatten(1, len(split.axes))

    def gather(self, tokens: Tensor, grid: Grid) -> Tensor:
        """`B N D` -> `(B G) M D`; places without a token hold zeros."""
        return self.arrange(tokens, grid).flatten(0, 1)

    def scatter(self, groups: Tensor, grid: Grid) -> Tensor:
        """`(B G) M D` -> `B N D`: the inverse of `gather`."""
        return self.restore(groups.unflatten(0, (-1, self.split(grid).shape[0])), grid)

    def runs(self, grid: Grid) -> tuple[Run, ...]:
        """The groups, cut into runs of neighbours of the same length, so that padding costs the groups that have it."""
        return _runs(self, grid)


@lru_cache(maxsize=256)
def _runs(pattern: Pattern, grid: Grid) -> tuple[Run, ...]:
    split = pattern.split(grid)
    if split.padded == split.axes:
        return (Run(0, split.shape[0], split.shape[1], None),)
    real = pattern.arrange(torch.ones(1, grid.tokens, dtype=torch.bool, device="cpu"), grid)[0]
    needed = [int(row.nonzero()[-1]) + 1 if row.any() else 0 for row in real]
    runs: list[Run] = []
    start = 0
    for group in range(1, len(real) + 1):
        if group == len(real) or needed[group] != needed[start]:
            length = needed[start]
            kept = real[start:group, :length]
            runs.append(Run(start, group, length, None if kept.all() else kept))
            start = group
    return tuple(runs)


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


@dataclass(frozen=True)
class Dense(Pattern):
    """Every token with every other (v1.2)."""

    def split(self, grid: Grid) -> Split:
        """One group."""
        return Split((grid.tokens,), (grid.tokens,), (grid.tokens,), ())


@dataclass(frozen=True)
class Spatial(Pattern):
    """Each frame alone: one half of 2+1D attention (v1.0, v1.1)."""

    def split(self, grid: Grid) -> Split:
        """A group for each frame."""
        factors = (grid.frames, grid.height * grid.width)
        return Split((grid.tokens,), (grid.tokens,), factors, (0,))


@dataclass(frozen=True)
class Temporal(Pattern):
    """Each place alone, over all frames: the other half of 2+1D attention (v1.0, v1.1)."""

    def split(self, grid: Grid) -> Split:
        """A group for each place in a frame."""
        factors = (grid.frames, grid.height * grid.width)
        return Split((grid.tokens,), (grid.tokens,), factors, (1,))


@dataclass(frozen=True)
class _Sparse(Pattern):
    k: int

    def __post_init__(self) -> None:
        check_number(f"{type(self).__name__}: k", self.k, 1, whole=True)


@dataclass(frozen=True)
class SingleSkip(_Sparse):
    """Skiparse single skip: every k-th token in one group (report v1.3, "Single Skip").

    The tokens are filled up to a multiple of k*k, as for the group skip that it alternates with.
    """

    def split(self, grid: Grid) -> Split:
        """`(g k) -> k g`."""
        padded = _up(grid.tokens, self.k * self.k)
        return Split((grid.tokens,), (padded,), (padded // self.k, self.k), (1,))


@dataclass(frozen=True)
class GroupSkip(_Sparse):
    """Skiparse group skip: runs of k neighbours, every k-th run in one group (report v1.3, "Group Skip")."""

    def split(self, grid: Grid) -> Split:
        """`(n m k) -> m (n k)` with m = k."""
        padded = _up(grid.tokens, self.k * self.k)
        return Split((grid.tokens,), (padded,), (padded // (self.k * self.k), self.k, self.k), (1,))


@dataclass(frozen=True)
class Window(_Sparse):
    """Windows of k neighbours, which the report compares with the group skip ("Skip + Window")."""

    def split(self, grid: Grid) -> Split:
        """`(n k) -> n k`."""
        padded = _up(grid.tokens, self.k)
        return Split((grid.tokens,), (padded,), (padded // self.k, self.k), (0,))


@dataclass(frozen=True)
class SingleSkip2D(_Sparse):
    """Skiparse-2D single skip: every k-th row and every k-th column, of all frames, in one group."""

    def split(self, grid: Grid) -> Split:
        """`t (g k) (h l) -> (k l) (t g h)` with l = k."""
        axes, k = (grid.frames, grid.height, grid.width), self.k
        padded = (grid.frames, _up(grid.height, k * k), _up(grid.width, k * k))
        return Split(axes, padded, (grid.frames, padded[1] // k, k, padded[2] // k, k), (2, 4))


@dataclass(frozen=True)
class GroupSkip2D(_Sparse):
    """Skiparse-2D group skip: tiles of k x k tokens, every k-th tile along both sides, of all frames, in one group."""

    def split(self, grid: Grid) -> Split:
        """`t (n m k) (o p l) -> (m p) (t n k o l)` with m = p = l = k."""
        axes, k = (grid.frames, grid.height, grid.width), self.k
        padded = (grid.frames, _up(grid.height, k * k), _up(grid.width, k * k))
        return Split(axes, padded, (grid.frames, padded[1] // k**2, k, k, padded[2] // k**2, k, k), (2, 5))
