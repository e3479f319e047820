"""A clip's tokens split over processes; `test_gradients` compares predictions and gradients."""

import copy

import pytest
import torch
from denoisers import EVERY_PATTERN, FAMILIES, ODD, SUV, V13, inputs_of, make, relative
from processes import Processes

from osp.denoiser import Grid, Stage
from osp.errors import UsageError
from osp.parallel import split_sequence
from osp.parallel.sequence import check_splits
from osp.parallel.sequence_bytes import exchanged_bytes
from osp.parallel.sequence_layout import Layout, keeps_groups, plan_layouts, plan_move


def predicted(family: str, change: str) -> float:
    """The error of the prediction of a split model after a change to it."""
    model = make(family, [{"blocks": 1}, {"blocks": 2, "pattern": "skiparse", "k": 2}], torch.float64)
    inputs = inputs_of(model, ODD, "video", 2)
    whole = model(**inputs).detach()
    sent = split_sequence(model)
    with torch.inference_mode():  # leaves nothing behind that a training step could not take
        model(**inputs)
    assert sent.sent["tokens"] > 0
    if change == "copied":
        model = copy.deepcopy(model)
    else:
        model.compile_blocks(backend="eager")
    before = sent.sent.total()
    prediction = model(**inputs)
    prediction.sum().backward()
    assert sent.sent.total() > before
    return relative(prediction.detach(), whole)


@pytest.mark.parametrize("change", ["copied", "compiled"])
def test_copies_and_compiled_blocks_are_split_too(processes: Processes, change: str) -> None:
    for family in FAMILIES:
        assert max(processes.run(2, predicted, family, change)) < 1e-10


def test_what_cannot_be_split_is_refused() -> None:
    model = make("cross", V13, torch.float32)
    with pytest.raises(UsageError, match="sequence=3 does not divide the 4 heads of CrossTransformer; use one of 1, 2"):
        check_splits(model, 3)
    check_splits(model, 4)
    model.splits_tokens = False  # type: ignore[misc]
    with pytest.raises(UsageError, match="its tokens cannot be split"):
        check_splits(model, 2)


GRIDS = [Grid(4, 4, 4), Grid(5, 3, 7), Grid(9, 2, 5), Grid(1, 1, 3)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_layouts_hold_each_token_once_and_groups_whole(grid: Grid, ranks: int) -> None:
    for stage in EVERY_PATTERN:
        for pattern in Stage(**stage).patterns:  # type: ignore[arg-type]
            layout = Layout(grid, ranks, pattern)
            held = [layout.tokens(rank).tolist() for rank in range(ranks)]
            assert sorted(token for own in held for token in own) == list(range(grid.tokens))
            groups = pattern.arrange(torch.arange(1, grid.tokens + 1)[None], grid)[0].tolist()
            for group in groups:
                assert sum(bool({place - 1 for place in group if place} & {*own}) for own in held) <= 1
            if keeps_groups(pattern, grid, ranks):
                assert max(map(len, held)) <= 1.25 * grid.tokens / ranks


def test_groups_stay_whole_where_they_can_be_shared_out() -> None:
    grid = Grid(8, 16, 16)
    whole = {
        (stage["pattern"], type(pattern).__name__, ranks): keeps_groups(pattern, grid, ranks)
        for stage in EVERY_PATTERN[1:]
        for pattern in Stage(**stage).patterns  # type: ignore[arg-type]
        for ranks in (2, 4, 8)
    }
    # Skiparse with k = 4 has four groups, and single skips with k = 2 two.
    assert {key for key, kept in whole.items() if not kept} == {
        ("skiparse", "SingleSkip", 8),
        ("skiparse", "GroupSkip", 8),
        ("skip_window", "SingleSkip", 4),
        ("skip_window", "SingleSkip", 8),
        ("skiparse_2d", "SingleSkip2D", 8),
        ("skiparse_2d", "GroupSkip2D", 8),
    }
    assert not keeps_groups(Stage(1).patterns[0], grid, 2)


@pytest.mark.parametrize("grid", GRIDS)
def test_moves_bring_each_token_to_its_new_place(grid: Grid) -> None:
    ranks, schedule = 3, [pattern for stage in EVERY_PATTERN for pattern in Stage(**stage).patterns]  # type: ignore[arg-type]
    layouts = [Layout(grid, ranks), *(Layout(grid, ranks, pattern) for pattern in schedule)]
    for before in layouts:
        for after in layouts:
            moves = [plan_move(before, after, rank, torch.device("cpu")) for rank in range(ranks)]
            parcels = [before.tokens(rank)[move.sends].split(move.given) for rank, move in enumerate(moves)]
            for rank, move in enumerate(moves):
                coming = [parcel[rank] for parcel in parcels]
                assert [len(parcel) for parcel in coming] == list(move.taken)
                assert torch.cat(coming)[move.order].tolist() == after.tokens(rank).tolist()
            nothing = [not sum(move.given) - move.given[rank] for rank, move in enumerate(moves)]
            assert all(move.stays == all(nothing) for move in moves)


def test_blocks_without_whole_groups_take_a_neighbours_layout() -> None:
    patterns = [pattern for stage in V13 for pattern in Stage(**stage).patterns]  # type: ignore[arg-type]
    layouts = plan_layouts(tuple(patterns), Grid(4, 4, 4), 2)
    assert layouts[0] == layouts[1]
    assert layouts[-1] == layouts[-2]
    assert len({*layouts}) == 2
    assert plan_layouts((patterns[0],), Grid(4, 4, 4), 2) == (Layout(Grid(4, 4, 4), 2),)


def counted(family: str) -> dict[str, int]:
    """The bytes that this process sends in one forward pass of a split model."""
    model = make(family, SUV, torch.float64)
    sent = split_sequence(model).sent
    with torch.no_grad():
        model(**inputs_of(model, ODD, "", 2))
    return dict(sent)


def test_bytes_are_counted_as_they_are_sent(processes: Processes) -> None:
    for family in FAMILIES:
        ranks = processes.run(2, counted, family)
        with torch.device("meta"):
            model = FAMILIES[family][0](stages=SUV, **FAMILIES[family][1]).double()
        bytes_of, _ = exchanged_bytes(model, ODD, 5, 2, batch=2)
        assert bytes_of == {use: sum(each[use] for each in ranks) for use in ranks[0]}
        assert bytes_of["tokens"] > 0
        assert bytes_of["heads"] > 0
