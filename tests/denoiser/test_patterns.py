"""Patterns: permutations with padding, and groups as the reports define them."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from osp.denoiser.grid import Grid
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
)
from osp.errors import UsageError

PLAIN: tuple[type[Pattern], ...] = (Dense, Spatial, Temporal)
SPARSE: tuple[Callable[[int], Pattern], ...] = (SingleSkip, GroupSkip, Window, SingleSkip2D, GroupSkip2D)
TWO_DIMENSIONAL = (SingleSkip2D, GroupSkip2D)
PADDING = -1

grids = st.builds(Grid, st.integers(1, 6), st.integers(1, 9), st.integers(1, 9))
patterns = st.one_of(
    st.sampled_from(PLAIN).map(lambda kind: kind()),
    st.builds(lambda kind, k: kind(k), st.sampled_from(SPARSE), st.integers(1, 5)),
)
quick = settings(deadline=None, max_examples=150)


def test_no_pattern_is_left_out(pattern_kinds: set[type[Pattern]]) -> None:
    assert {*PLAIN, *SPARSE} == pattern_kinds


def up(size: int, step: int) -> int:
    return math.ceil(size / step) * step


def defined_groups(pattern: Pattern, grid: Grid) -> list[list[int]]:
    """The groups as the reports define them, from each token's place alone; PADDING where there is no token."""
    k = getattr(pattern, "k", 1)
    frames, height, width = grid
    if isinstance(pattern, TWO_DIMENSIONAL):
        groups: list[list[int]] = [[] for _ in range(k * k)]
        for t in range(frames):
            for h in range(up(height, k * k)):
                for w in range(up(width, k * k)):
                    token = (t * height + h) * width + w if h < height and w < width else PADDING
                    row, column = (h % k, w % k) if isinstance(pattern, SingleSkip2D) else (h // k % k, w // k % k)
                    groups[row * k + column].append(token)
        return groups

    padded = {Window: up(grid.tokens, k), SingleSkip: up(grid.tokens, k * k), GroupSkip: up(grid.tokens, k * k)}
    count, number = {
        Dense: (1, lambda i: 0),
        Spatial: (frames, lambda i: i // (height * width)),
        Temporal: (height * width, lambda i: i % (height * width)),
        SingleSkip: (k, lambda i: i % k),
        GroupSkip: (k, lambda i: i // k % k),
        Window: (up(grid.tokens, k) // k, lambda i: i // k),
    }[type(pattern)]
    groups = [[] for _ in range(count)]
    for i in range(padded.get(type(pattern), grid.tokens)):
        groups[number(i)].append(i if i < grid.tokens else PADDING)
    return groups


def gathered_groups(pattern: Pattern, grid: Grid) -> list[list[int]]:
    numbers = torch.arange(1, grid.tokens + 1)  # 0 is what padding holds
    return (pattern.gather(numbers[None, :, None], grid)[..., 0] - 1).tolist()


@quick
@given(patterns, grids)
def test_groups_are_those_of_the_reports(pattern: Pattern, grid: Grid) -> None:
    groups = gathered_groups(pattern, grid)
    assert groups == defined_groups(pattern, grid)
    assert sorted(i for group in groups for i in group if i != PADDING) == list(range(grid.tokens))


@quick
@given(patterns, grids, st.integers(1, 2), st.lists(st.integers(1, 3), min_size=1, max_size=2))
def test_scatter_inverts_gather_to_the_bit(pattern: Pattern, grid: Grid, batch: int, trailing: list[int]) -> None:
    tokens = torch.randn(batch, grid.tokens, *trailing)
    groups = pattern.gather(tokens, grid)
    number, places = pattern.split(grid).shape
    assert groups.shape == (batch * number, places, *trailing)
    assert torch.equal(pattern.scatter(groups, grid), tokens)

    arranged = pattern.arrange(tokens, grid)
    assert torch.equal(arranged.flatten(0, 1), groups)
    assert torch.equal(pattern.restore(arranged, grid), tokens)
    for item in range(batch):  # groups of the same clip lie together
        assert torch.equal(pattern.gather(tokens[item : item + 1], grid), arranged[item])


@quick
@given(patterns, grids)
def test_tokens_without_trailing_axes(pattern: Pattern, grid: Grid) -> None:
    tokens = torch.randn(2, grid.tokens)
    arranged = pattern.arrange(tokens, grid)
    assert arranged.shape == (2, *pattern.split(grid).shape)
    assert torch.equal(arranged, pattern.arrange(tokens[..., None], grid)[..., 0])
    assert torch.equal(pattern.restore(arranged, grid), tokens)


@quick
@given(patterns, grids)
def test_padding_holds_zeros(pattern: Pattern, grid: Grid) -> None:
    groups = pattern.gather(torch.ones(1, grid.tokens, 1), grid)[..., 0]
    assert groups.tolist() == [[float(i != PADDING) for i in group] for group in defined_groups(pattern, grid)]


@quick
@given(patterns, grids)
def test_runs_cover_the_groups_and_say_what_is_real(pattern: Pattern, grid: Grid) -> None:
    real = [[i != PADDING for i in group] for group in defined_groups(pattern, grid)]
    after = 0
    for run in pattern.runs(grid):
        assert run.start == after < run.stop
        after = run.stop
        for row in real[run.start : run.stop]:
            assert run.length == max((place + 1 for place, token in enumerate(row) if token), default=0)
        wanted = [row[: run.length] for row in real[run.start : run.stop]]
        assert (run.real is None) == all(all(row) for row in wanted)
        if run.real is not None:
            assert run.real.tolist() == wanted
    assert after == len(real)


def test_neighbours_with_the_same_padding_share_a_run() -> None:
    # ten tokens, filled up to twelve: both single skips miss their last, one group skip its last two
    runs = SingleSkip(2).runs(Grid(1, 2, 5))
    assert [(run.start, run.stop, run.length, run.real) for run in runs] == [(0, 2, 5, None)]
    runs = GroupSkip(2).runs(Grid(1, 2, 5))
    assert [(run.start, run.stop, run.length, run.real) for run in runs] == [(0, 1, 6, None), (1, 2, 4, None)]
    assert len(Window(4).runs(Grid(3, 3, 3))) == 2  # six full windows in one run, and the last
    assert len(Temporal().runs(Grid(3, 3, 3))) == 1


@pytest.mark.parametrize("kind", SPARSE)
@given(grid=grids)
@settings(deadline=None, max_examples=20)
def test_one_group_of_all(kind: Callable[[int], Pattern], grid: Grid) -> None:
    groups = gathered_groups(kind(1), grid)
    if kind is Window:
        assert groups == [[i] for i in range(grid.tokens)]  # windows of one token
    else:
        assert groups == [list(range(grid.tokens))]


@quick
@given(patterns, grids)
def test_gather_is_a_view_where_it_can_be(pattern: Pattern, grid: Grid) -> None:
    split = pattern.split(grid)
    assume(split.axes == split.padded and not isinstance(pattern, GroupSkip | SingleSkip2D | GroupSkip2D))
    tokens = torch.randn(1, grid.tokens, 3)
    assert pattern.arrange(tokens, grid).data_ptr() == tokens.data_ptr()
    assert pattern.gather(tokens, grid).data_ptr() == tokens.data_ptr()


@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize("k", [0, -1, 1.5, True, None])
def test_wrong_k(kind: Callable[[object], Pattern], k: object) -> None:
    with pytest.raises(UsageError, match=r"k=.*: must be a whole number of at least 1"):
        kind(k)


@quick
@given(patterns, grids)
def test_gradients_pass_as_they_are(pattern: Pattern, grid: Grid) -> None:
    tokens = torch.randn(2, grid.tokens, 2, requires_grad=True)
    weight = torch.randn(2, grid.tokens, 2)
    (pattern.scatter(pattern.gather(tokens, grid), grid) * weight).sum().backward()
    assert tokens.grad is not None
    assert torch.equal(tokens.grad, weight)
