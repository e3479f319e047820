"""How many attentions information needs from one token to another.

Everything is counted from the groups that `Pattern.gather` makes of token numbers, so it holds for what the model runs,
padding and odd grids included. Tokens that share all their groups are alike: they are counted together, as a cell.
"""

import math
from collections.abc import Callable, Sequence
from functools import wraps
from itertools import combinations, product
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from osp.denoiser.grid import Grid
from osp.denoiser.patterns.arrangement import Pattern
from osp.errors import UsageError

P = ParamSpec("P")
R = TypeVar("R")

# Limits: distances in one matrix; entries of a search held at a time; its entries x patterns x steps (half a minute on
# one core); entries of a matrix of groups by groups.
_PAIRS, _HELD, _WORK, _MEETINGS = 2**26, 2**22, 2**33, 2**28


def _on_the_cpu(count: Callable[P, R]) -> Callable[P, R]:
    """The function with its tensors on the CPU, also where models are being built on the meta device."""

    @wraps(count)
    def counted(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.device("cpu"):
            return count(*args, **kwargs)

    return counted


class _Cells(NamedTuple):
    """How many tokens each cell holds (`C`), and the number of its group in each pattern (`C` each)."""

    sizes: Tensor
    groups: list[Tensor]


@_on_the_cpu
def average_attention_distance(patterns: Sequence[Pattern], grid: Grid | tuple[int, int, int]) -> float:
    """The fewest attentions that carry information between two tokens, averaged over all pairs of different tokens.

    Each attention may use any of the patterns (report v1.3, "average attention distance"). The result is exact, and
    infinite where some tokens never hear of each other. The report's closed forms differ from it by less than 1/N: they
    count a token's distance to itself too, some as 0 and some as 1.

    Raises:
        UsageError: there is no pattern, the grid is none, or counting would take minutes (patterns that leave many
            tokens of a large grid more than two attentions apart, such as windows of different sizes).
    """
    tokens, cells = _cells(patterns, grid)
    cells = _Cells(cells.sizes, _widest(cells.groups))
    sizes, groups = cells
    from_one = _search(groups, torch.zeros(1, dtype=torch.long))
    if (from_one < 0).any():
        return math.inf  # sharing a group is mutual: what one token cannot reach, none of those that it reaches can
    soon = _within_two(groups)
    far = (~soon).nonzero()[:, 0]
    searching = len(far) * len(sizes) * len(groups) * int(from_one.max())
    if max(searching, 32 * len(sizes) << len(groups)) > _WORK:
        raise UsageError(
            f"the distances of {', '.join(map(str, patterns))} on {tokens} tokens take too long to count: most tokens "
            "are more than two attentions apart, or the patterns are too many; take a smaller grid"
        )
    total = int((sizes * (2 * tokens - _within_one(cells) - 1))[soon].sum())
    for sources in far.split(max(1, _HELD // len(sizes))):
        own = sizes[sources]
        total += int((sizes @ _search(groups, sources).long() * own).sum() + (own * (own - 1)).sum())
    return _mean(total, tokens)


@_on_the_cpu
def pairwise_distances(patterns: Sequence[Pattern], grid: Grid | tuple[int, int, int]) -> Tensor:
    """The distance of each token from each other, by search: `N N`, whole numbers, -1 where there is no way.

    Raises:
        UsageError: there is no pattern, the grid is none, or it has more than 8192 tokens.
    """
    grid = _checked(patterns, grid)
    if grid.tokens**2 > _PAIRS:
        raise UsageError(f"{grid.tokens} tokens are too many for a matrix of all distances; take a smaller grid")
    groups = [_group_of(pattern, grid) for pattern in dict.fromkeys(patterns)]
    sources = torch.arange(grid.tokens).split(max(1, _HELD // grid.tokens))
    return torch.cat([_search(groups, some) for some in sources], dim=1)


def blocks_until_reached(schedule: Sequence[Pattern], grid: Grid | tuple[int, int, int]) -> float:
    """Blocks of a stack, in their order, that carry information from a token to another, on average.

    Information comes in before block i, and each block from i on counts as one until the other token has it. The mean
    is over all pairs of different tokens, and over the blocks i from which on the stack reaches every token. Those are
    the first ones: the last blocks of a stack may be too few to mix all tokens, and what comes in there is not counted.
    `blocks_from_each` gives the value for each i. Infinite where even the whole stack leaves some tokens unreached.

    Raises:
        UsageError: as `blocks_from_each`.
    """
    reaching = [blocks for blocks in blocks_from_each(schedule, grid) if blocks < math.inf]
    return sum(reaching) / len(reaching) if reaching else math.inf


@_on_the_cpu
def blocks_from_each(schedule: Sequence[Pattern], grid: Grid | tuple[int, int, int]) -> list[float]:
    """The number of blocks that information needs on average, for each block i before which it may come in.

    Block i counts as one. Infinite where the stack ends before each token has reached all others. Only the blocks'
    attention among these tokens counts: where they also attend to text that attends to them, there are ways through
    the text.

    Raises:
        UsageError: there is no block, the grid is none, or the matrix of which group meets which gets too large.
    """
    _, cells = _cells(schedule, grid)
    group_in = dict(zip(dict.fromkeys(schedule), cells.groups, strict=True))
    groups = [group_in[pattern] for pattern in schedule]
    return [_blocks(groups[start:], cells.sizes) for start in range(len(groups))]


def _blocks(groups: list[Tensor], sizes: Tensor) -> float:
    """Blocks until reached, from the first of them: the pairs not reached yet, summed over the blocks."""
    tokens, here = int(sizes.sum()), groups[0]
    sources = _total(sizes, here)
    missing = tokens**2 - int(sources.square().sum())
    total = tokens**2 - tokens + missing
    reached: Tensor | None = None  # sources x groups of the block just passed; None: each source its own group
    for after in groups[1:]:
        if missing == 0:
            break
        if not torch.equal(after, here):
            shape = len(sources) if reached is None else _count(here), _count(after)
            if max(len(sources), shape[0]) * shape[1] > _MEETINGS:
                raise UsageError(f"{shape[0]} groups, then {shape[1]}: too many to follow; take a smaller grid")
            meets = torch.zeros(shape, dtype=torch.bool)
            meets[here, after] = True
            reached = meets if reached is None else reached.float() @ meets.float() > 0
            waiting = ~reached.all(1)
            reached, sources = reached[waiting], sources[waiting]
            missing = int(sources @ ((~reached).long() @ _total(sizes, after)))
            here = after
        total += missing
    return _mean(total, tokens) if missing == 0 else math.inf


def _mean(total: int, tokens: int) -> float:
    """Over the pairs of different tokens; 0 if there is only one."""
    return total / max(1, tokens * (tokens - 1))


def _checked(patterns: Sequence[Pattern], grid: tuple[int, int, int]) -> Grid:
    if not patterns:
        raise UsageError("an attention distance needs at least one pattern")
    if len(grid) != 3 or not all(isinstance(size, int) and size > 0 for size in grid):
        raise UsageError(f"{tuple(grid)} is no grid; it takes frames, height and width, whole numbers from 1")
    return Grid(*grid)


def _cells(patterns: Sequence[Pattern], grid: tuple[int, int, int]) -> tuple[int, _Cells]:
    """The number of tokens, and the cells that the patterns, each taken once, cut them into."""
    grid = _checked(patterns, grid)
    groups = [_group_of(pattern, grid) for pattern in dict.fromkeys(patterns)]
    cell = _common(groups)
    sizes = cell.bincount()
    one_of = torch.empty_like(sizes)
    one_of[cell] = torch.arange(len(cell))  # whichever comes last: they are alike
    return grid.tokens, _Cells(sizes, [group[one_of] for group in groups])


def _group_of(pattern: Pattern, grid: Grid) -> Tensor:
    """The number of each token's group, `N`; groups without tokens have no number."""
    numbers = torch.arange(1, grid.tokens + 1)  # 0 is padding
    gathered = pattern.gather(numbers[None, :, None], grid)[..., 0]
    group, place = gathered.nonzero(as_tuple=True)
    of = torch.empty_like(numbers)
    of[gathered[group, place] - 1] = group
    return of.unique(return_inverse=True)[1]


def _count(groups: Tensor) -> int:
    return int(groups.max()) + 1


def _total(sizes: Tensor, groups: Tensor) -> Tensor:
    """The number of tokens in each group."""
    return torch.zeros(_count(groups), dtype=torch.long).index_add_(0, groups, sizes)


def _common(partitions: Sequence[Tensor]) -> Tensor:
    """The numbers of the parts that all partitions together cut their elements into."""
    part = partitions[0]
    for other in partitions[1:]:
        part = (part * _count(other) + other).unique(return_inverse=True)[1]
    return part


def _widest(groups: list[Tensor]) -> list[Tensor]:
    """Without the patterns whose every group lies in one of another's: they carry nothing further."""
    kept: list[Tensor] = []
    for new in sorted(groups, key=_count):  # a pattern lies within another only if it has as many groups, or more
        if all(_count(_common([new, wide])) > _count(new) for wide in kept):
            kept.append(new)
    return kept


def _within_one(cells: _Cells) -> Tensor:
    """How many tokens a cell's token sees in one attention, itself included: `C`, by inclusion and exclusion."""
    near = torch.zeros_like(cells.sizes)
    for patterns in range(1, len(cells.groups) + 1):
        for some in combinations(cells.groups, patterns):
            part = _common(some)
            near += (-1) ** (patterns + 1) * _total(cells.sizes, part)[part]
    return near


def _within_two(groups: list[Tensor]) -> Tensor:
    """Which cells are surely no more than two attentions from all others: `C`.

    Those are the cells with a group that meets every group of one pattern.
    """
    soon = torch.zeros(len(groups[0]), dtype=torch.bool)
    for first, second in product(groups, repeat=2):
        met = (first * _count(second) + second).unique() // _count(second)
        soon |= (met.bincount() == _count(second))[first]
    return soon


def _search(groups: list[Tensor], sources: Tensor) -> Tensor:
    """Breadth first: the distance of every cell from each source, `C S`, -1 where there is no way."""
    reached = torch.zeros(len(groups[0]), len(sources), dtype=torch.bool)
    reached[sources, torch.arange(len(sources))] = True
    distance = reached.int() - 1
    step = 0
    while True:
        step += 1
        known = reached.float()
        spread = reached.clone()
        for group in groups:
            spread |= (torch.zeros(_count(group), len(sources)).index_add_(0, group, known) > 0)[group]
        new = spread & ~reached
        if not new.any():
            return distance
        distance[new] = step
        reached = spread
