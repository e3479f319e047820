"""The order in which shards are read in sequence: a pure function, split into lanes that any processes can share.

All that is said here is about one group of clips that share batches (`osp.data.plan`). In each pass the shards are put
into an order that follows from seed and pass, and the group's clips into a line, shard by shard. The passes make one
endless line. Global batches, of G clips each, take it in blocks: block e has the batches that pass e fills, so that no
clip is lost where passes and batches do not meet.

A block is cut into runs, one for each slot: the places of a global batch are divided into `slots` parts, and its
batches go round `lanes`. A rank reads a few neighbouring parts of each batch and a worker a few lanes, so that each
reads some runs, and with them their shards, alone. Within its run a slot shuffles with a buffer of `buffer` clips, by
webdataset's shuffle: a clip is drawn from the buffer, and the next one of the line takes its place. Only numbers are
shuffled; so where a run goes on after any number of batches, at any number of ranks and workers, is known without
reading what came before.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import torch
import webdataset
from numpy.typing import NDArray

from osp.checks import check_number
from osp.data.plan import Group
from osp.seeds import seeded, stable_seed

Numbers = NDArray[np.int64]

_PASSES = 3  # lines that are kept: a run may lie across the end of a pass


@dataclass(frozen=True)
class Lanes:
    """The fixed split of the data, which does not depend on how many processes there are.

    Args:
        slots: parts of a global batch. A multiple of the ranks lets each rank read shards of its own.
        lanes: a multiple of each rank's workers lets each worker read shards of its own.
        buffer: clips that each slot shuffles.
    """

    slots: int
    lanes: int
    buffer: int

    def __post_init__(self) -> None:
        check_number("slots", self.slots, 1, 4096, whole=True)
        check_number("lanes", self.lanes, 1, 4096, whole=True)
        check_number("buffer", self.buffer, 1, whole=True)

    def __str__(self) -> str:
        return f"slots={self.slots} lanes={self.lanes} buffer={self.buffer} shuffle={_shuffle_digest()}"


class LaneOrder:
    """The clips of a group, as `osp.data.plan.Order`.

    Args:
        shard_of: the number of each clip's shard, for all clips of the source.
        needed: is told the numbers of shards that are needed now and soon.
    """

    def __init__(
        self,
        group: Group,
        shard_of: Numbers,
        lanes: Lanes,
        seed: int,
        shuffle: bool,
        needed: Callable[[Sequence[int]], None],
    ) -> None:
        self.lanes, self.seed, self.shuffle, self._needed = lanes, seed, shuffle, needed
        self._clips = np.asarray(group.clips, dtype=np.int64)
        self._shards = shard_of[self._clips]
        self._count = int(shard_of.max()) + 1
        self._batch = group.batch
        self._parts = math.gcd(group.batch, lanes.slots)
        self._size = group.batch // self._parts  # of a part
        self._lines: dict[int, Numbers] = {}
        self._runs: dict[tuple[int, int, int], Numbers] = {}
        per_shard = max(1, len(self._clips) // max(1, len(np.unique(self._shards))))
        self._soon = lanes.buffer + per_shard

    def candidates(self, turn: int, place: int) -> Iterator[tuple[int, int]]:
        """See `osp.data.plan.Order`; tells at once which shards that takes."""
        clips = len(self._clips)
        block = -(-(turn + 1) * self._batch // clips) - 1
        part, within = divmod(place, self._size)
        batch_of_lane, lane = divmod(turn - self._batches_before(block), self.lanes.lanes)
        number = batch_of_lane * self._size + within
        begin, end = self._bounds(block, part, lane)
        run = self._run(block, part, lane)
        self._needed(self._shards_at(int(run[number]), min(begin + number + self._soon, end)))
        # What replaces a broken clip: the rest of the run, and then all clips, so that whichever can be read is found.
        return self._drawn(itertools.chain(run[number:].tolist(), range(end, end + 2 * clips)))

    def _drawn(self, positions: Iterator[int]) -> Iterator[tuple[int, int]]:
        for attempt, position in enumerate(positions):
            number = position // len(self._clips)
            yield int(self._clips[self._at(position)]), stable_seed("draw", self.seed, number, attempt)

    def _shards_at(self, *positions: int) -> list[int]:
        return [int(self._shards[self._at(position)]) for position in positions]

    def _at(self, position: int) -> int:
        """The place in the group of a position in the endless line."""
        number, place = divmod(position, len(self._clips))
        return int(self._line(number)[place])

    def _batches_before(self, block: int) -> int:
        return block * len(self._clips) // self._batch

    def _bounds(self, block: int, part: int, lane: int) -> tuple[int, int]:
        """Where a slot's run begins and ends in the endless line."""
        before = self._batches_before(block)
        batches, lanes = self._batches_before(block + 1) - before, self.lanes.lanes
        begins = [batches // lanes * each + min(each, batches % lanes) for each in (lane, lane + 1)]
        first = before * self._batch + part * batches * self._size
        return first + begins[0] * self._size, first + begins[1] * self._size

    def _run(self, block: int, part: int, lane: int) -> Numbers:
        """The positions of a slot's run, in the order in which they are read."""
        key = block, part, lane
        if key not in self._runs:
            for old in [other for other in self._runs if other[0] < block - 1 or other[0] > block + 1]:
                del self._runs[old]
            begin, end = self._bounds(*key)
            positions: Iterator[int] = iter(range(begin, end))
            if self.shuffle:
                positions = shuffled(positions, self.lanes.buffer, stable_seed("buffer", self.seed, *key))
            self._runs[key] = np.fromiter(positions, np.int64, end - begin)
        return self._runs[key]

    def _line(self, number: int) -> Numbers:
        """The places in the group, in the order of a pass."""
        if number not in self._lines:
            if len(self._lines) == _PASSES:
                del self._lines[next(iter(self._lines))]
            if self.shuffle:
                # The same order of shards for all groups, so that they read the same shards at about the same time.
                rank = torch.randperm(self._count, generator=seeded("shards", self.seed, number)).numpy()
                self._lines[number] = np.argsort(rank[self._shards], kind="stable")
            else:
                self._lines[number] = np.arange(len(self._clips))
        return self._lines[number]


def shuffled(numbers: Iterator[int], buffer: int, seed: int) -> Iterator[int]:
    """The numbers as they come out of a shuffle buffer of webdataset."""
    stage = webdataset.shuffle(buffer, initial=buffer, rng=Random(seed))
    return iter(webdataset.DataPipeline(lambda: numbers, stage))


def _shuffle_digest() -> str:
    """Changes if the library ever shuffles otherwise: then a run cannot go on exactly, and its state is refused."""
    return hashlib.sha256(repr([*shuffled(iter(range(40)), 8, 0)]).encode()).hexdigest()[:8]
