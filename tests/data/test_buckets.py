"""Buckets: the rule against brute force, and batches of one shape that are the same however they are read."""

import itertools
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from osp.data.buckets import Bucket, BucketRule, ShapeList, TokenRule, bucket_table, choose, make_buckets
from osp.data.datamodule import ClipDataModule
from osp.data.loader import FixedLoader, ResumableLoader
from osp.data.media.shape import Shape
from osp.data.media.video import ClipError
from osp.data.shards.build import write_rendered
from osp.data.sources import BucketClips, ClipSource, FirstClips, clip_size
from osp.devices.mesh import Mesh
from osp.errors import DataError, UsageError

V13 = TokenRule(4, 8, min_tokens=1, max_tokens=24 * 924, max_frames=93, frame_tokens=(400, 924))


def brute_force(rule: TokenRule, clip: Shape) -> Shape | None:
    """The rule as its documentation has it, over all shapes."""
    best: tuple[Any, Shape] | None = None
    step = rule.size_stride
    for frames in range(1, clip.frames + 1):
        if (frames - 1) % rule.time_stride or (rule.max_frames is not None and frames > rule.max_frames):
            continue
        videos = rule.max_frames is None or rule.max_frames > rule.time_stride
        if clip.frames > 1 and videos and frames < (rule.min_frames or 1 + rule.time_stride):
            continue
        for height, width in itertools.product(range(step, clip.height + 1, step), range(step, clip.width + 1, step)):
            side = rule.space_stride * rule.patch_size
            frame = height // side * (width // side)
            tokens = frame * (1 + (frames - 1) // rule.time_stride)
            low, high = rule.frame_tokens or (1, tokens)
            limited = frames > 1 or rule.frame_tokens is None
            if not low <= frame <= high or tokens > rule.max_tokens or (limited and tokens < rule.min_tokens):
                continue
            scale = max(Fraction(height, clip.height), Fraction(width, clip.width))
            in_view = Fraction(height * width) / (clip.height * scale * clip.width * scale)
            kept = Fraction(height * width, clip.height * clip.width) * in_view
            rank = (frames, kept, in_view, height)
            if best is None or rank > best[0]:
                best = rank, Shape(frames, height, width)
    return None if best is None else best[1]


@st.composite
def rules(draw: st.DrawFn) -> TokenRule:
    time_stride, space_stride, patch_size = draw(st.tuples(*[st.sampled_from(n) for n in ([4, 8], [2, 4], [1, 2])]))
    least = draw(st.integers(1, 60))
    low = draw(st.integers(1, 20))
    min_frames = draw(st.none() | st.integers(1, 12))
    return TokenRule(
        time_stride,
        space_stride,
        patch_size,
        min_tokens=least,
        max_tokens=least + draw(st.integers(0, 100)),
        size_stride=space_stride * patch_size * draw(st.integers(1, 2)),
        min_frames=min_frames,
        max_frames=draw(st.none() | st.integers(min_frames or 1, 30)),
        frame_tokens=draw(st.none() | st.just((low, low + draw(st.integers(0, 40))))),
    )


@settings(max_examples=300, deadline=None)
@given(rules(), st.builds(Shape, st.integers(1, 30), st.integers(1, 60), st.integers(1, 60)))
def test_the_rule_is_what_brute_force_finds(rule: TokenRule, clip: Shape) -> None:
    assert rule.fit(clip) == brute_force(rule, clip)


@pytest.mark.parametrize(
    ("clip", "shape"),
    [
        (Shape(300, 1080, 1920), Shape(93, 352, 640)),
        (Shape(300, 1920, 1080), Shape(93, 640, 352)),
        (Shape(50, 720, 720), Shape(49, 480, 480)),
        (Shape(1, 1080, 1920), Shape(1, 352, 640)),
        (Shape(93, 320, 320), Shape(93, 320, 320)),
        (Shape(93, 319, 330), None),
        (Shape(4, 1080, 1920), None),
    ],
)
def test_published_limits_give_published_shapes(clip: Shape, shape: Shape | None) -> None:
    assert V13.fit(clip) == shape
    assert shape is None or V13.tokens(shape) <= V13.max_tokens


def test_a_list_of_shapes_is_chosen_from_by_the_same_measure() -> None:
    shapes = ShapeList(8, 8, shapes=((57, 288, 512), (57, 512, 288), (121, 288, 512), (1, 256, 256), (1, 256, 448)))
    assert shapes.fit(Shape(100, 720, 1280)) == Shape(57, 288, 512)
    assert shapes.fit(Shape(121, 720, 1280)) == Shape(121, 288, 512)
    assert shapes.fit(Shape(60, 1280, 720)) == Shape(57, 512, 288)
    assert shapes.fit(Shape(1, 1000, 1800)) == Shape(1, 256, 448)
    assert shapes.fit(Shape(1, 1000, 1000)) == Shape(1, 256, 256)
    assert shapes.fit(Shape(20, 720, 1280)) is None
    assert ShapeList(8, 8, shapes=(Shape(1, 256, 256),)).fit(Shape(20, 720, 1280)) == Shape(1, 256, 256)


@pytest.mark.parametrize(
    "build",
    [
        lambda: TokenRule(4, 8, size_stride=24),
        lambda: TokenRule(4, 8, min_tokens=10, max_tokens=9),
        lambda: TokenRule(4, 8, frame_tokens=(0, 9)),
        lambda: TokenRule(0, 8),
        lambda: TokenRule(4, 8, min_frames=9, max_frames=5),
        lambda: ShapeList(4, 8),
        lambda: ShapeList(4, 8, shapes=(Shape(2, 16, 16),)),
        lambda: ShapeList(4, 8, shapes=(Shape(5, 16, 24),)),
    ],
)
def test_senseless_rules_are_refused(build: Any) -> None:
    with pytest.raises(UsageError, match="buckets"):
        build()


def test_clips_that_fit_nowhere_are_counted() -> None:
    rule = TokenRule(4, 8, size_stride=16, max_tokens=100)
    sizes = [Shape(9, 32, 48), None, Shape(9, 8, 48), Shape(9, 40, 50), Shape(1, 64, 64), Shape(3, 64, 64)]
    kept, shapes, dropped = choose(sizes, rule)
    assert (kept, shapes) == ([0, 3, 4], [Shape(9, 32, 48), Shape(9, 32, 48), Shape(1, 64, 64)])
    assert list(dropped.values()) == [1, 2]
    kept, _, dropped = choose(sizes, rule, min_clips=2)
    assert kept == [0, 3]
    assert list(dropped.values()) == [1, 2, 1]
    table = bucket_table(make_buckets(shapes, rule), [5, 2], dropped)
    assert table.splitlines()[1].split() == ["1", "64", "64", "16", "1", "33.3", "%", "5"]
    assert "3 clips in 2 buckets" in table
    assert "left out: 1 clips, of unknown size" in table


# --- loading ----------------------------------------------------------------------------------------------------------

UNIT = TokenRule(4, 8, size_stride=16, max_tokens=1 << 30)


class Numbers(ClipSource):
    """Clip i has the shape that is given and the value i; the caption tells the draw."""

    def __init__(self, shapes: list[Shape], broken: tuple[int, ...] = (), rule: BucketRule = UNIT) -> None:
        self.shapes, self.broken = shapes, frozenset(broken)
        self._buckets = make_buckets(shapes, rule)

    def __len__(self) -> int:
        return len(self.shapes)

    def buckets(self) -> list[Bucket]:
        return self._buckets

    def fingerprint(self) -> str:
        return f"numbers {self.shapes}"

    def read(self, index: int, draw: int) -> dict[str, Any]:
        if index in self.broken:
            raise ClipError(f"clip{index}", "scratched")
        frames, height, width = self.shapes[index]
        video = torch.full((3, frames, height, width), index % 251, dtype=torch.uint8)
        return {"video": video, "caption": f"draw {draw}", "key": f"{index}", "fps": 8.0}


A, B, C, D = Shape(5, 16, 32), Shape(5, 32, 16), Shape(1, 32, 32), Shape(9, 16, 16)
MIXED = [A] * 9 + [B] * 4 + [C] * 7 + [D]
TOKENS = {A: 4, B: 4, C: 4, D: 3}


def loader(shapes: list[Shape] = MIXED, broken: tuple[int, ...] = (), **wanted: Any) -> ResumableLoader:
    return ResumableLoader(Numbers(shapes, broken), **({"batch_tokens": 12, "seed": 0} | wanted))


def take(loader: ResumableLoader, steps: int) -> list[Any]:
    endless = itertools.chain.from_iterable(loader for _ in itertools.count())
    return list(itertools.islice(endless, steps))


def content(batches: list[Any]) -> list[tuple[Any, ...]]:
    return [(tuple(b["video"].shape[1:]), b["key"], b["caption"], b["sample"].tolist(), b["broken"]) for b in batches]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=4, max_size=4).filter(any),
    st.integers(4, 40),
    st.integers(1, 3),
    st.integers(0, 3),
)
def test_every_batch_has_one_shape_and_keeps_to_the_budget(
    counts: list[int], tokens: int, world_size: int, seed: int
) -> None:
    shapes = [shape for shape, count in zip(TOKENS, counts, strict=True) for _ in range(count)]
    ranks = [
        loader(shapes, batch_tokens=tokens, seed=seed, mesh=Mesh(world_size, rank=rank)) for rank in range(world_size)
    ]
    seen: Counter[str] = Counter()
    samples: set[int] = set()
    rounds = sum(len(b.clips) / (tokens // b.tokens * world_size) for b in Numbers(shapes).buckets())
    steps = int(4 * rounds)
    for parts in zip(*(take(rank, steps) for rank in ranks), strict=True):
        (shape,) = {tuple(part["video"].shape[2:]) for part in parts}
        for part in parts:
            assert len(part["key"]) == tokens // TOKENS[Shape(*shape)]
            assert samples.isdisjoint(part["sample"].tolist())
            samples.update(part["sample"].tolist())
            seen.update(part["key"])
    for bucket in Numbers(shapes).buckets():
        read = [seen[str(index)] for index in bucket.clips]
        assert max(read) - min(read) <= 1 + max(0, (tokens // bucket.tokens) * world_size // len(bucket.clips))
        # Four passes, up to what fills no batch yet.
        assert abs(sum(read) - 4 * len(read)) <= (len(counts) + 1) * (tokens // bucket.tokens) * world_size


def test_one_bucket_is_the_plan_of_a_fixed_shape() -> None:
    class Plain(Numbers):
        def buckets(self) -> None:  # type: ignore[override]
            return None

    plain = ResumableLoader(Plain([A] * 10), batch_size=3, seed=4)
    bucketed = loader([A] * 10, batch_tokens=13, seed=4)
    assert content(take(plain, 20)) == content(take(bucketed, 20))
    assert len(plain) == len(bucketed) == 3


def test_ranks_and_workers_change_nothing() -> None:
    whole = content(take(loader(devices=4, broken=(2, 10, 11, 12, 9)), 25))
    assert {size[1:] for size, *_ in whole} == {tuple(A), tuple(C)}  # no clip of B can be read; D's turn is rare
    for world_size, workers in ((1, 2), (2, 0), (4, 2)):
        ranks = [
            content(
                take(
                    loader(broken=(2, 10, 11, 12, 9), mesh=Mesh(world_size, rank=r), devices=4, workers=workers),
                    25,
                )
            )
            for r in range(world_size)
        ]
        for number, (size, keys, captions, samples, _) in enumerate(whole):
            parts = [rank[number] for rank in ranks]
            assert {part[0] for part in parts} == {size}
            for place, wanted in ((1, keys), (2, captions), (3, samples)):
                assert list(itertools.chain.from_iterable(part[place] for part in parts)) == wanted


@pytest.mark.parametrize("ratio", [None, 0.3])
def test_a_run_stopped_anywhere_goes_on_the_same(ratio: float | None) -> None:
    whole = content(take(loader(broken=(3,), image_ratio=ratio), 24))
    for done in range(24):
        first = loader(broken=(3,), image_ratio=ratio)
        take(first, done)
        second = loader(broken=(3,), image_ratio=ratio, workers=2 if done % 12 == 5 else 0)
        second.load_state_dict(first.state_dict())
        assert content(take(second, 24 - done)) == whole[done:]
    # A place far on is found without the way there.
    far = loader(image_ratio=ratio)
    far.load_state_dict(far.state_dict() | {"steps": 10**9, "batches": 10**9})
    assert len(take(far, 3)) == 3


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1 / 3, 0.9, 1.0])
def test_the_ratio_of_images_is_kept_everywhere(ratio: float) -> None:
    images = [batch["video"].shape[2] == 1 for batch in take(loader(image_ratio=ratio), 60)]
    for end in range(61):
        assert abs(sum(images[:end]) - ratio * end) < 1.01


def test_ratios_and_budgets_that_cannot_be_are_refused() -> None:
    for wanted, told in (
        ({"image_ratio": 1.5}, "between 0 and 1"),
        ({"batch_tokens": 3}, "alone has 4 tokens"),
        ({"batch_tokens": 0}, "at least 1"),
        ({"batch_size": 3}, "give one of them"),
        ({"batch_tokens": None}, "give one of them"),
        ({"devices": 3, "mesh": Mesh(2)}, "multiple of the 2 devices"),
        ({"shapes": [A], "image_ratio": 0.5}, "there are no images"),
        ({"shapes": [C], "image_ratio": 0.5}, "there are no videos"),
    ):
        with pytest.raises(UsageError, match=told):
            loader(**wanted)


def test_a_changed_budget_or_ratio_is_refused() -> None:
    state = loader(image_ratio=0.5).state_dict()
    for wanted, told in (
        ({"image_ratio": 0.25}, "image_ratio was 0.5, is 0.25"),
        ({}, "image_ratio was 0.5, is None"),
        ({"image_ratio": 0.5, "batch_tokens": 13}, "batch_tokens was 12, is 13"),
        ({"image_ratio": 0.5, "mesh": Mesh(2)}, "devices was 1, is 2"),
    ):
        with pytest.raises(UsageError, match=told):
            loader(**wanted).load_state_dict(state)


def test_a_bucket_without_a_readable_clip_costs_its_clips_not_the_run() -> None:
    only = tuple(i for i, shape in enumerate(MIXED) if shape in (B, D))
    batches = take(loader(broken=only), 30)
    assert {tuple(batch["video"].shape[2:]) for batch in batches} == {A, C}
    assert sum(batch["broken"] for batch in batches) >= len(only)
    with pytest.raises(DataError, match=r"21 clips in a row cannot be read \(of 21\)"):
        take(loader(broken=tuple(range(len(MIXED)))), 1)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_counts_each_clip_once_bucket_by_bucket(world_size: int) -> None:
    source = Numbers(MIXED, broken=(20, 5))
    ranks = [list(FixedLoader(source, batch_tokens=12, mesh=Mesh(world_size, rank=r))) for r in range(world_size)]
    assert len({tuple(batch["video"].shape for batch in rank) for rank in ranks}) == 1
    counted: Counter[str] = Counter()
    for batch in itertools.chain(*ranks):
        for key, weight in zip(batch["key"], batch["weight"].tolist(), strict=True):
            counted[key] += int(weight)
    assert {key: count for key, count in counted.items() if count} == {
        str(i): 1 for i in range(len(MIXED)) if i not in (20, 5)
    }


def test_first_clips_keep_their_buckets() -> None:
    few = FirstClips(Numbers(MIXED), 11)
    assert {b.shape: b.clips.tolist() for b in few.buckets()} == {A: list(range(9)), B: [9, 10]}


# --- real files -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("shards") / "out"
    sizes = [(9, 48, 64), (12, 64, 48), (10, 50, 66), (1, 64, 64), (3, 64, 64), (9, 24, 24), (1, 40, 40)]
    clips = []
    for number, (frames, height, width) in enumerate(sizes):
        values = 10 * torch.arange(frames).view(1, -1, 1, 1).expand(3, frames, height, width)
        kind = "image" if frames == 1 else "video"
        clips.append((f"clip{number}", values.to(torch.uint8), {"fps": 8.0, "caption": f"{number}", "kind": kind}))
    write_rendered(clips, output, lossless=True)
    return output


def test_shards_are_read_in_the_shapes_of_their_buckets(folder: Path) -> None:
    rule = TokenRule(4, 8, size_stride=16, max_tokens=40)
    source = BucketClips(folder, rule, random_start=True, flip=True)
    assert [entry.key for entry in source.entries] == ["clip0", "clip1", "clip2", "clip3", "clip5", "clip6"]
    assert list(source.dropped.values()) == [1]
    for bucket in source.buckets():
        for index in bucket.clips:
            clip = source.read(int(index), 3)
            assert tuple(clip["video"].shape[1:]) == bucket.shape
            assert torch.equal(clip["video"], source.read(int(index), 3)["video"])
    assert {b.shape for b in source.buckets()} == {
        Shape(9, 48, 64),
        Shape(9, 64, 48),
        Shape(9, 16, 16),
        Shape(1, 64, 64),
        Shape(1, 32, 32),
    }
    starts = {int(source.read(1, draw)["video"][0, 0, 0, 0]) for draw in range(20)}
    assert len(starts) > 1
    assert len(BucketClips(folder, rule, min_clips=2)) == 2
    assert source.fingerprint() != BucketClips(folder, rule, flip=False).fingerprint()
    assert source.fingerprint() != BucketClips(folder, TokenRule(4, 8, size_stride=16, max_tokens=30)).fingerprint()
    assert len(BucketClips([folder, folder], rule)) == 12
    with pytest.raises(DataError, match=r"no bucket has a clip \(7 .*too small"):
        BucketClips(folder, TokenRule(4, 8, min_tokens=1000))


@given(st.integers(1, 300), st.floats(1, 120), st.none() | st.floats(1, 60))
def test_a_clip_has_the_frames_that_its_record_promises(frames: int, rate: float, fps: float | None) -> None:
    record = {"frames": frames, "fps": rate, "height": 10, "width": 20, "kind": "video"}
    size = clip_size(record, 1, fps)
    assert size is not None
    assert size.frames == frames if fps is None else size.frames >= 1
    if fps is not None:  # as `read_clip` counts
        assert (size.frames - 1) / fps <= (frames - 0.49) / rate + 1e-9
        assert size.frames / fps > (frames - 0.49) / rate - 1e-9


def test_the_datamodule_prints_the_table_and_resumes(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    rule = TokenRule(4, 8, size_stride=16, max_tokens=40)
    data = ClipDataModule(BucketClips(folder, rule), BucketClips(folder, rule, random_start=False), batch_tokens=72)
    with caplog.at_level("INFO", logger="osp"):
        loader = data.train_dataloader()
    assert "6 clips in 5 buckets" in caplog.text
    assert "left out: 1 clips, which no bucket suits" in caplog.text
    batch = next(iter(loader))
    assert batch["video"].shape[0] >= 2
    assert data.state_dict()["batches"] == 1
    val = data.val_dataloader()
    assert isinstance(val, FixedLoader)
    assert sum(int(batch["weight"].sum()) for batch in val) == 6
