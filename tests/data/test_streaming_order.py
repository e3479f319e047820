"""The order of shards that are read in sequence: each clip once a pass, the same at any ranks and workers, local."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osp.data.plan import Group, Slot, TrainPlan
from osp.data.streaming.order import LaneOrder, Lanes, shuffled
from osp.devices.mesh import Mesh


def plan(
    shards: list[int], groups: list[Group], lanes: Lanes, mesh: Mesh | None = None, shuffle: bool = True, seed: int = 0
) -> TrainPlan:
    """Of clips that lie in these shards."""
    numbers = np.array(shards, dtype=np.int64)

    def order(group: Group, seed: int, shuffle: bool) -> LaneOrder:
        return LaneOrder(group, numbers, lanes, seed, shuffle, lambda needed: None)

    return TrainPlan(groups, seed, mesh, shuffle, None, order)


def read(slots: list[Slot]) -> list[tuple[int, int, int]]:
    """Sample, clip and draw of each."""
    return [(slot.sample, *next(slot.candidates)) for slot in slots]


def batches(plan: TrainPlan, numbers: range) -> list[list[tuple[int, int, int]]]:
    return [read(next(plan.attempts(number))) for number in numbers]


def one_group(clips: int, batch: int) -> list[Group]:
    return [Group(range(clips), batch)]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 16), st.integers(1, 9), st.integers(1, 6), st.integers(1, 5), st.integers(1, 9)
)
def test_every_pass_reads_every_clip_once(
    clips: int, batch: int, shards: int, slots: int, lanes: int, buffer: int
) -> None:
    order = plan([clip % shards for clip in range(clips)], one_group(clips, batch), Lanes(slots, lanes, buffer))
    # So many batches end at the end of a pass, whatever the sizes.
    read = Counter(clip for batch in batches(order, range(clips)) for _, clip, _ in batch)
    assert read == dict.fromkeys(range(clips), batch)
    whole = clips // batch * batch  # what the first block holds are clips of the first pass, once each
    first = [clip for numbers in batches(order, range(clips // batch)) for _, clip, _ in numbers]
    assert len({*first}) == whole


@pytest.mark.parametrize(("world", "batch"), [(2, 12), (3, 12), (4, 12), (6, 12)])
def test_any_number_of_ranks_reads_the_same_samples(world: int, batch: int) -> None:
    shards = [clip // 7 for clip in range(100)]
    whole = batches(plan(shards, one_group(100, batch), Lanes(4, 3, 5)), range(40))
    parts = [
        batches(plan(shards, one_group(100, batch), Lanes(4, 3, 5), Mesh(world, rank=rank)), range(40))
        for rank in range(world)
    ]
    assert [list(itertools.chain(*step)) for step in zip(*parts, strict=True)] == whole


def test_ranks_and_workers_read_shards_of_their_own() -> None:
    shards = [clip // 10 for clip in range(960)]
    seen: list[set[int]] = []
    for rank, worker in itertools.product(range(2), range(2)):
        order = plan(shards, one_group(960, 8), Lanes(4, 4, 16), Mesh(2, rank=rank))
        steps = range(worker, 120, 2)  # as torch's loader deals batches out
        seen.append({shards[clip] for step in steps for _, clip, _ in read(next(order.attempts(step)))})
    assert set.union(*seen) == set(range(96))
    # Of 96 shards each reads a quarter, and those that two runs share.
    assert sum(map(len, seen)) <= 96 + 16


def test_a_run_goes_on_without_reading_what_came_before() -> None:
    shards = [clip // 5 for clip in range(60)]
    whole = batches(plan(shards, one_group(60, 4), Lanes(2, 3, 7)), range(50))
    for start in (1, 14, 15, 16, 37):
        assert batches(plan(shards, one_group(60, 4), Lanes(2, 3, 7)), range(start, 50)) == whole[start:]


def test_the_buffer_mixes_a_run_and_one_clip_keeps_the_shards_in_sequence() -> None:
    shards = [clip // 6 for clip in range(60)]

    def order(buffer: int, shuffle: bool = True) -> list[int]:
        plain = plan(shards, one_group(60, 1), Lanes(1, 1, buffer), shuffle=shuffle)
        return [clip for numbers in batches(plain, range(60)) for _, clip, _ in numbers]

    kept = [shard for shard, _ in itertools.groupby(shards[clip] for clip in order(1))]
    assert sorted(kept) == list(range(10)) != kept
    changes = [len([*itertools.groupby(shards[clip] for clip in order(buffer))]) for buffer in (1, 6, 30)]
    assert changes == sorted(changes)
    assert changes[1] > 20
    assert order(6, shuffle=False) == list(range(60))


def test_buckets_read_every_clip_as_often_and_the_same_shards_at_a_time() -> None:
    shards = [clip // 8 for clip in range(80)]
    groups = [Group(list(range(0, 80, 2)), 4), Group(list(range(1, 80, 4)), 2), Group(list(range(3, 80, 4)), 6)]
    order = plan(shards, groups, Lanes(2, 1, 2))
    passes = batches(order, range(3 * (10 + 10) + 10))  # 20 clips fill ten batches of 6 in three passes
    assert Counter(clip for batch in passes for _, clip, _ in batch) == dict.fromkeys(range(80), 3)
    samples = [sample for batch in passes for sample, _, _ in batch]
    assert len({*samples}) == len(samples)


def test_what_replaces_a_broken_clip_is_in_the_end_any_that_can_be_read() -> None:
    order = plan([clip // 4 for clip in range(24)], one_group(24, 4), Lanes(2, 2, 3))
    for number in range(12):
        for slot in next(order.attempts(number)):
            assert {clip for clip, _ in slot.candidates} == set(range(24))


def test_the_library_shuffles_as_it_did() -> None:
    # What a run has stored goes on only if the same numbers come out.
    assert str(Lanes(8, 4, 128)) == "slots=8 lanes=4 buffer=128 shuffle=410ca06e"
    assert sorted(shuffled(iter(range(30)), 7, 3)) == list(range(30))
    assert [*shuffled(iter(range(30)), 7, 3)] != [*shuffled(iter(range(30)), 7, 4)]
