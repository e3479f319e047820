"""A clip's tokens split over processes: predictions and gradients are those of one process."""

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import Processes
from torch import Tensor, nn

from osp.denoiser import CrossTransformer, Denoiser, Grid, JointTransformer, Stage
from osp.denoiser.patterns import Pattern, Window, register_pattern
from osp.errors import UsageError
from osp.parallel import split_sequence
from osp.parallel.sequence import check_splits
from osp.parallel.sequence_bytes import exchanged_bytes
from osp.parallel.sequence_layout import Layout, keeps_groups, plan_layouts, plan_move

CROSS: dict[str, Any] = {"channels": 3, "out_channels": 3, "heads": 4, "head_dim": 6, "text_channels": 5}
JOINT = CROSS | {"head_dim": 16, "pooled_channels": 6, "modulation_width": 8}
FAMILIES: dict[str, tuple[type[Denoiser], dict[str, Any]]] = {
    "cross": (CrossTransformer, CROSS),
    "joint": (JointTransformer, JOINT),
}


def windows_of_three() -> Sequence[Pattern]:
    """A pattern as a user registers it."""
    return Window(3), Window(5)


register_pattern("windows_of_three", windows_of_three)

EVERY_PATTERN = [
    {"blocks": 1},
    {"blocks": 2, "pattern": "2+1d"},
    {"blocks": 2, "pattern": "skiparse", "k": 4},
    {"blocks": 2, "pattern": "skip_window", "k": 2},
    {"blocks": 2, "pattern": "skiparse_2d", "k": 2},
    {"blocks": 2, "pattern": "windows_of_three"},
]
# As v1.5: sparse towards the middle, with the long skips of published models.
SUV = [{"blocks": 2, "pattern": "skiparse", "k": k} if k > 1 else {"blocks": 1} for k in (1, 2, 4, 2, 1)]
# As v1.3: dense at both ends.
V13 = [{"blocks": 1}, {"blocks": 3, "pattern": "skiparse", "k": 4}, {"blocks": 1}]

EVEN, ODD, SMALL = (4, 8, 8), (5, 6, 14), (1, 2, 6)


def make(family: str, stages: Any, dtype: torch.dtype) -> Denoiser:
    """A small model of which every weight matters."""
    kind, settings = FAMILIES[family]
    generator = torch.Generator().manual_seed(0)
    model = kind(stages=stages, **settings)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model.to(dtype)


def inputs_of(model: Denoiser, size: tuple[int, int, int], padded: str, batch: int) -> dict[str, Tensor]:
    """Inputs that go with it; `padded` says of what some is padding: "video", "text", both or neither."""
    generator, dtype = torch.Generator().manual_seed(1), model.out.weight.dtype
    made = {
        "latent": torch.randn(batch, model.latent_channels, *size, generator=generator, dtype=dtype),
        "time": 1000 * torch.rand(batch, generator=generator, dtype=dtype),
        "text": torch.randn(batch, 5, model.text_channels, generator=generator, dtype=dtype),
    }
    if model.pooled_channels is not None:
        made["pooled_text"] = torch.randn(batch, model.pooled_channels, generator=generator, dtype=dtype)
    if "text" in padded:
        made["text_mask"] = (torch.arange(5) < torch.tensor([3, 5])[:batch, None]).to(dtype)
    if "video" in padded:
        made["video_mask"] = torch.ones(batch, *size, dtype=dtype)
        made["video_mask"][0, :, :, size[2] // 2 :] = 0
        made["video_mask"][-1, size[0] // 2 :] = 0
    return made


def computed(model: Denoiser, inputs: dict[str, Tensor], ranks: int) -> tuple[Tensor, list[Tensor]]:
    """The prediction, and the parameters' gradients that are left after the average over so many processes."""
    model.zero_grad()
    prediction = model(**inputs)
    weights = torch.linspace(-1, 1, prediction.numel(), dtype=prediction.dtype).view_as(prediction)
    (prediction * weights).sum().backward()
    parameters = list(model.parameters())
    flat = torch.cat([(torch.zeros_like(one) if one.grad is None else one.grad).flatten() for one in parameters])
    if ranks > 1:
        dist.all_reduce(flat)
    return prediction.detach(), list((flat / ranks).split([one.numel() for one in parameters]))


def errors(
    family: str, stages: Any, size: tuple[int, int, int], padded: str, batch: int, dtype: torch.dtype, recompute: int
) -> tuple[float, float]:
    """The largest error of the prediction, and of any parameter's gradient, relative to their largest values."""
    model = make(family, stages, dtype)
    inputs = inputs_of(model, size, padded, batch)
    prediction, gradients = computed(model, inputs, 1)
    split_sequence(model)
    model.recompute_every = recompute
    prediction_2, gradients_2 = computed(model, inputs, dist.get_world_size())
    return relative(prediction_2, prediction), max(map(relative, gradients_2, gradients))


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference to the largest value; a gradient that ought to be zero must be."""
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))


def all_errors(cases: list[Any]) -> list[tuple[float, float]]:
    """`errors` of each case."""
    return [errors(*case) for case in cases]


def cases(ranks: int) -> list[tuple[Any, ...]]:
    """Every pattern and family, padded or not, on even and odd grids; few where many processes share the cores."""
    double = torch.float64
    made: list[tuple[Any, ...]] = [
        ("cross", EVERY_PATTERN, ODD, "video text", 2, double, 0),
        ("joint", SUV, ODD, "video text", 1, double, 1),
        ("joint", V13, SMALL, "", 2, double, 0),
        ("joint", EVERY_PATTERN, EVEN, "video", 2, double, 0),
    ]
    if ranks == 2:
        made += [
            ("cross", EVERY_PATTERN, EVEN, "", 1, double, 0),
            ("cross", EVERY_PATTERN, ODD, "", 2, double, 0),
            ("cross", EVERY_PATTERN, EVEN, "video", 2, double, 1),
            ("cross", V13, ODD, "text", 2, double, 2),
            ("joint", EVERY_PATTERN, ODD, "", 2, double, 0),
            ("joint", EVERY_PATTERN, ODD, "video text", 2, double, 1),
            ("joint", SUV, EVEN, "text", 2, double, 0),
            ("cross", V13, ODD, "video", 2, torch.float32, 0),
            ("joint", SUV, ODD, "", 2, torch.float32, 0),
        ]
    return made


@pytest.mark.parametrize("ranks", [2, 4])
def test_predictions_and_gradients_are_those_of_one_process(processes: Processes, ranks: int) -> None:
    tried = cases(ranks)
    for found in processes.run(ranks, all_errors, tried):
        for case, (prediction, gradient) in zip(tried, found, strict=True):
            bar = 1e-10 if torch.float64 in case else 1e-5
            assert prediction < bar, case
            assert gradient < bar, case


def predicted(family: str, change: str) -> float:
    """The error of the prediction of a split model after a change to it."""
    model = make(family, SUV, torch.float64)
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
