"""Attention distances: the report's table, and plain search token by token."""

import math
from collections.abc import Sequence
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from osp.denoiser import CrossTransformerConfig, Grid, JointTransformerConfig
from osp.denoiser.patterns import (
    Dense,
    GroupSkip,
    GroupSkip2D,
    Pattern,
    SingleSkip,
    SingleSkip2D,
    Spatial,
    Temporal,
    Window,
    average_attention_distance,
    blocks_from_each,
    blocks_until_reached,
    pairwise_distances,
)
from osp.denoiser.patterns import distance as module
from osp.errors import UsageError

REPORT = Grid(24, 32, 32)  # of the table in report v1.3
LATENTS = {"v1.3, 93x720x1280": Grid(24, 45, 80), "v1.5, 121x576x1024": Grid(16, 36, 64)}
V13 = [Dense()] * 2 + [SingleSkip(4), GroupSkip(4)] * 14 + [Dense()] * 2
STAGES = list(zip([2, 4, 6, 8, 6, 4, 2], [1, 2, 4, 8, 4, 2, 1], strict=True))
SUV = [
    Dense() if k == 1 else GroupSkip(k) if block % 2 else SingleSkip(k)
    for blocks, k in STAGES
    for block in range(blocks)
]

grids = st.builds(Grid, st.integers(1, 3), st.integers(1, 5), st.integers(1, 5))
all_patterns = st.one_of(
    st.sampled_from([Dense(), Spatial(), Temporal(), Spatial(), Temporal()]),
    st.builds(
        lambda kind, k: kind(k),
        st.sampled_from([SingleSkip, GroupSkip, Window, SingleSkip2D, GroupSkip2D]),
        st.integers(1, 5),
    ),
)
quick = settings(deadline=None, max_examples=100)


def neighbours(pattern: Pattern, grid: Grid) -> list[set[int]]:
    """For each token the tokens that it attends to, from the gather of token numbers."""
    groups = pattern.gather(torch.arange(1, grid.tokens + 1)[None, :, None], grid)[..., 0].tolist()
    members = [{token - 1 for token in group if token} for group in groups]
    return [next(group for group in members if token in group) for token in range(grid.tokens)]


def spread(reached: set[int], sees: list[set[int]]) -> set[int]:
    return set().union(*(sees[token] for token in reached))


def searched_distances(patterns: Sequence[Pattern], grid: Grid) -> list[list[int]]:
    """Breadth first, token by token; -1 where there is no way."""
    tables = [neighbours(pattern, grid) for pattern in patterns]
    rows = []
    for start in range(grid.tokens):
        row = [-1] * grid.tokens
        reached, step = {start}, 0
        while reached:
            for token in reached:
                row[token] = step
            step += 1
            reached = {t for table in tables for t in spread(reached, table) if row[t] < 0}
        rows.append(row)
    return rows


def followed_blocks(schedule: Sequence[Pattern], grid: Grid) -> float:
    """Blocks until reached from the first block on, token by token."""
    total = 0
    for start in range(grid.tokens):
        reached = {start}
        for number, pattern in enumerate(schedule, start=1):
            wider = spread(reached, neighbours(pattern, grid))
            total += number * len(wider - reached)
            reached = wider
        if len(reached) < grid.tokens:
            return math.inf
    return total / max(1, grid.tokens * (grid.tokens - 1))


def mean(rows: list[list[int]]) -> float:
    values = [value for row in rows for value in row]
    return math.inf if min(values) < 0 else sum(values) / max(1, len(values) - len(rows))


def test_table_of_the_report() -> None:
    def printed(*patterns: Pattern) -> str:
        return f"{average_attention_distance(patterns, REPORT):.3f}"

    assert printed(Dense()) == "1.000"
    assert printed(Spatial(), Temporal()) == "1.957"
    sizes = (2, 4, 6, 8)
    assert [printed(SingleSkip(k), Window(k)) for k in sizes] == ["1.500", "1.750", "1.833", "1.875"]
    assert [printed(SingleSkip(k), GroupSkip(k)) for k in sizes] == ["1.250", "1.563", "1.694", "1.766"]


@pytest.mark.parametrize("grid", [REPORT, *LATENTS.values(), Grid(4, 8, 8)])
def test_closed_forms(grid: Grid) -> None:
    """The report's, over all pairs, less what each token adds as its own neighbour: 0, but 1 in the one of Skiparse."""
    tokens, one = grid.tokens, Fraction(1)

    def without_self(closed: Fraction, itself: int) -> float:
        return float((closed * tokens - itself) / (tokens - 1))

    assert average_attention_distance([Dense()], grid) == 1
    plane = one / grid.frames + one / (grid.height * grid.width)
    assert average_attention_distance([Spatial(), Temporal()], grid) == without_self(2 - plane, 0)
    for k in (2, 4):
        window = 2 - one / k - Fraction(k, tokens)
        assert average_attention_distance([SingleSkip(k), Window(k)], grid) == without_self(window, 0)
        skiparse = 2 - Fraction(2, k) + one / k**2
        assert average_attention_distance([SingleSkip(k), GroupSkip(k)], grid) == without_self(skiparse, 1)


@quick
@given(st.lists(all_patterns, min_size=1, max_size=4), grids)
def test_counted_as_searched(patterns: list[Pattern], grid: Grid) -> None:
    matrix = pairwise_distances(patterns, grid)
    assert matrix.tolist() == searched_distances(patterns, grid)
    assert average_attention_distance(patterns, grid) == mean(matrix.tolist())


wide_grids = st.builds(Grid, st.integers(1, 5), st.integers(1, 12), st.integers(1, 12))


@quick
@given(st.lists(all_patterns, min_size=2, max_size=4), wide_grids)
def test_counted_as_searched_on_larger_grids(patterns: list[Pattern], grid: Grid) -> None:
    assert average_attention_distance(patterns, grid) == mean(pairwise_distances(patterns, grid).tolist())


def test_far_tokens_of_a_large_grid() -> None:
    """Where only some tokens are more than two attentions apart, only those are searched for."""
    grid = Grid(3, 7, 11)
    patterns = [Window(5), SingleSkip(9), GroupSkip(3)]
    assert pairwise_distances(patterns, grid).max() > 2
    assert average_attention_distance(patterns, grid) == mean(pairwise_distances(patterns, grid).tolist())
    large = Grid(31, 45, 80)
    assert 1.857 < average_attention_distance([SingleSkip(7), Window(7)], large) < 1.858  # the last window is not full


@quick
@given(st.lists(all_patterns, min_size=1, max_size=6), grids)
def test_blocks_as_followed(schedule: list[Pattern], grid: Grid) -> None:
    starts = blocks_from_each(schedule, grid)
    assert starts == [followed_blocks(schedule[start:], grid) for start in range(len(schedule))]
    reaching = [blocks for blocks in starts if blocks < math.inf]
    assert starts[: len(reaching)] == reaching  # those that come too late are the last ones
    assert blocks_until_reached(schedule, grid) == (sum(reaching) / len(reaching) if reaching else math.inf)


@pytest.mark.parametrize("grid", LATENTS.values(), ids=LATENTS)
@pytest.mark.parametrize("schedule", [V13, SUV], ids=["v1.3", "v1.5"])
def test_published_stacks(schedule: list[Pattern], grid: Grid) -> None:
    """Both stacks come to the same mean, 53/32 blocks, as long as each token counts as its own neighbour too."""
    stages = CrossTransformerConfig.stages if schedule is V13 else JointTransformerConfig.stages
    assert schedule == [pattern for stage in stages for pattern in stage.patterns]
    others = grid.tokens - 1
    starts = (torch.tensor(blocks_from_each(schedule, grid), dtype=torch.float64) * others + 1) / grid.tokens
    expected = {
        "v1.3": [1.0] * 2 + [1.75] * 28 + [1.0] * 2,
        "v1.5": [1.0] * 2
        + [1.5, 1.5, 1.5, 2.0]  # not every group of group skip 2 meets every one of the single skip 4 that follows
        + [1.75, 1.75, 1.75, 1.75, 1.75, 2.25]
        + [1.875] * 8
        + [1.75] * 6
        + [1.5] * 4
        + [1.0] * 2,
    }["v1.3" if schedule is V13 else "v1.5"]
    torch.testing.assert_close(starts, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    assert math.isclose(blocks_until_reached(schedule, grid) * others + 1, 53 / 32 * grid.tokens, rel_tol=1e-12)
    assert average_attention_distance(schedule, grid) == 1  # the dense blocks connect all


def test_a_group_skip_and_the_single_skip_of_twice_its_size_never_mix() -> None:
    grid = Grid(4, 8, 8)
    assert average_attention_distance([GroupSkip(2), SingleSkip(4)], grid) == math.inf
    assert average_attention_distance([GroupSkip(4), SingleSkip(2)], grid) < 2
    assert average_attention_distance([GroupSkip(2), GroupSkip(4)], grid) < 2


def test_tokens_that_are_never_reached() -> None:
    assert average_attention_distance([Spatial()], REPORT) == math.inf
    assert average_attention_distance([Spatial()], Grid(1, 4, 4)) == 1
    assert pairwise_distances([Temporal()], Grid(2, 1, 2)).tolist() == [
        [0, -1, 1, -1],
        [-1, 0, -1, 1],
        [1, -1, 0, -1],
        [-1, 1, -1, 0],
    ]
    assert blocks_until_reached([Spatial(), Spatial()], REPORT) == math.inf
    assert blocks_until_reached([Spatial(), Temporal(), Dense()], (2, 2, 2)) == (11 / 7 + 13 / 7 + 7 / 7) / 3


def test_a_stack_that_ends_with_a_block_that_does_not_mix_counts_from_the_blocks_before() -> None:
    stack = [Spatial(), Temporal(), Spatial()]
    starts = blocks_from_each(stack, (2, 2, 2))
    assert starts == [11 / 7, 13 / 7, math.inf]
    assert blocks_until_reached(stack, (2, 2, 2)) == (11 / 7 + 13 / 7) / 2
    assert blocks_until_reached([Spatial(), Temporal()] * 14, REPORT) < 2


def test_distances_are_counted_under_the_meta_device() -> None:
    patterns, grid = [SingleSkip(2), GroupSkip(2), Window(3)], Grid(2, 5, 7)
    with torch.device("cpu"):
        counted = [average_attention_distance(patterns, grid), blocks_until_reached(patterns, grid)]
        pairs = pairwise_distances(patterns, grid)
    with torch.device("meta"):
        assert [average_attention_distance(patterns, grid), blocks_until_reached(patterns, grid)] == counted
        assert torch.equal(pairwise_distances(patterns, grid), pairs)


def test_one_token() -> None:
    assert average_attention_distance([SingleSkip(4), GroupSkip(4)], (1, 1, 1)) == 0
    assert blocks_until_reached([SingleSkip(4), GroupSkip(4)], (1, 1, 1)) == 0


@pytest.mark.parametrize("count", [average_attention_distance, pairwise_distances, blocks_until_reached])
def test_errors(count: object) -> None:
    assert callable(count)
    with pytest.raises(UsageError, match="at least one pattern"):
        count([], REPORT)
    for grid in ((4, 4), (4, 0, 4), (4, 4.0, 4)):
        with pytest.raises(UsageError, match="is no grid"):
            count([Dense()], grid)


def test_too_large() -> None:
    with pytest.raises(UsageError, match="24576 tokens are too many for a matrix"):
        pairwise_distances([Dense()], REPORT)
    with pytest.raises(UsageError, match=r"Temporal\(\), Window\(k=7\) on 24576 tokens take too long"):
        average_attention_distance([Temporal(), Window(7)], REPORT)
    with pytest.raises(UsageError, match="too many to follow"):
        blocks_until_reached([Window(2), Window(3), Dense()], LATENTS["v1.3, 93x720x1280"])


def test_searches_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    grid, patterns = Grid(2, 4, 7), [Temporal(), Window(5)]
    whole = pairwise_distances(patterns, grid)
    assert whole.max() > 2
    average = average_attention_distance(patterns, grid)
    monkeypatch.setattr(module, "_HELD", 100)
    assert torch.equal(pairwise_distances(patterns, grid), whole)
    assert average_attention_distance(patterns, grid) == average
