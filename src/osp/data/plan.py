"""Plans: which clip is read when follows from a few integers, so a stopped run goes on exactly.

A plan deals with groups: clips that may share a batch (one shape), and how many of them a global batch has (over all
processes). Where all clips have one size there is one group.

The samples of a group are numbered 0, 1, 2, ... without end. Sample n is read in pass n // clips over the group, at
place n % clips of a permutation that follows from (seed, pass). The group's batch k holds the samples k * G .. k * G +
G - 1 (G = its clips in a global batch) and of the processes that hold different clips the r-th takes the r-th run of
them; those that share clips take the same (`osp.devices.mesh`). What fills no batch at the end of a pass is not lost:
the next pass goes on.

Which group global batch b is of: in pass e over the whole source each group has as many batches as it has filled since
the pass before, floor((e + 1) * clips / G) - floor(e * clips / G), and they come in an order that follows from (seed,
e). So every clip is read equally often, whatever the size of its group.
"""

import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from osp.devices.mesh import Mesh
from osp.seeds import stable_seed


@dataclass(frozen=True)
class Slot:
    """One place in a batch: the (index, draw) pairs to try until one can be read."""

    sample: int
    candidates: Iterator[tuple[int, int]]
    weight: float = 1.0
    replaced_weight: float = 1.0  # the weight if the first candidate is broken


@dataclass(frozen=True, eq=False)
class Group:
    """Clips that may share a batch."""

    clips: Sequence[int] | NDArray[np.int64]  # their indices in the source
    batch: int  # clips in a global batch
    is_image: bool = False


class Order(Protocol):
    """The endless order in which the clips of a group are read."""

    def candidates(self, turn: int, place: int) -> Iterator[tuple[int, int]]:
        """The (index, draw) pairs to try at a place of the group's global batch `turn` (0, 1, ...)."""
        ...


class TrainPlan:
    """The endless plan of the module's docstring, as one process sees it.

    Args:
        groups: of which `batch` is a multiple of `mesh.data`.
        mesh: which part of each global batch is read here; None: all of it.
        image_ratio: the part of the batches that are images, evenly spread; None: images are groups like the others.
        order: gives a group its order, by (group, seed, shuffle); where there is none, or it gives none, that of the
            module's docstring counts.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        seed: int,
        mesh: Mesh | None = None,
        shuffle: bool = True,
        image_ratio: float | None = None,
        order: Callable[[Group, int, bool], Order | None] | None = None,
    ) -> None:
        self.groups, self.seed, self.shuffle = groups, seed, shuffle
        self.mesh = mesh or Mesh.single()
        orders = [None if order is None else order(group, seed, shuffle) for group in groups]
        self._orders: list[Order] = [
            own or _AnyOrder(group, seed, shuffle) for own, group in zip(orders, groups, strict=True)
        ]
        self._widest = max(group.batch for group in groups)
        numbers = range(len(groups))
        if image_ratio is None:
            self._images, videos = Fraction(0), list(numbers)
        else:
            self._images = Fraction(image_ratio).limit_denominator(10_000)
            videos = [number for number in numbers if not groups[number].is_image]
        self._streams = (
            _Stream(groups, videos, seed, shuffle),
            _Stream(groups, [number for number in numbers if number not in videos], seed, shuffle),
        )

    @property
    def epoch(self) -> float:
        """Batches in which about every clip is read once; with a ratio of images, every video."""
        videos, images = (stream.rate for stream in self._streams)
        return images if self._images == 1 else videos / float(1 - self._images)

    def attempts(self, batch: int) -> Iterator[list[Slot]]:
        """The slots to read here for global batch `batch`; then those of other groups, for when no clip can be read."""
        number, turn = self._locate(batch)
        yield self._slots(batch, number, turn)
        stream = next(stream for stream in self._streams if number in stream.numbers)
        others = sorted(stream.numbers, key=lambda other: -len(self.groups[other].clips))
        yield from (self._slots(batch, other, batch) for other in others if other != number)

    def _locate(self, batch: int) -> tuple[int, int]:
        """The group of a global batch, and how many batches of that group are before it."""
        images = batch * self._images.numerator // self._images.denominator
        is_image = (batch + 1) * self._images.numerator // self._images.denominator > images
        videos, pictures = self._streams
        return pictures.locate(images) if is_image else videos.locate(batch - images)

    def _slots(self, batch: int, number: int, turn: int) -> list[Slot]:
        size = self.groups[number].batch // self.mesh.data
        order = self._orders[number]
        places = range(self.mesh.data_rank * size, (self.mesh.data_rank + 1) * size)
        return [Slot(batch * self._widest + place, order.candidates(turn, place)) for place in places]


class _AnyOrder:
    """The samples of one group, where each clip can be read as well as any other."""

    def __init__(self, group: Group, seed: int, shuffle: bool) -> None:
        self.group, self.seed, self.shuffle = group, seed, shuffle
        self._orders: dict[int, Tensor] = {}

    def candidates(self, turn: int, place: int) -> Iterator[tuple[int, int]]:
        """See `Order`."""
        sample = turn * self.group.batch + place
        # A broken clip is replaced by those after it in the plan, so that a resumed run replaces it by the same one.
        clips = len(self.group.clips)
        for attempt in range(2 * clips):  # two passes hold every clip, wherever they begin
            epoch, place = divmod(sample + attempt, clips)
            index = self.group.clips[int(self._order(epoch)[place]) if self.shuffle else place]
            # `attempt` too: the replacement differs from its clip's own turn in window and flip.
            yield int(index), stable_seed("draw", self.seed, epoch, attempt)

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            if len(self._orders) == 2:  # a batch may lie across the end of a pass
                del self._orders[min(self._orders)]
            self._orders[epoch] = _permutation(len(self.group.clips), "order", self.seed, epoch)
        return self._orders[epoch]


class _Stream:
    """The endless batches of some groups, each in proportion to its clips."""

    def __init__(self, groups: Sequence[Group], numbers: Sequence[int], seed: int, shuffle: bool) -> None:
        self.numbers = numbers
        self._sizes = [(len(groups[number].clips), groups[number].batch) for number in numbers]
        self.rate = sum(clips / batch for clips, batch in self._sizes)  # batches in a pass
        self._seed, self._shuffle = seed, shuffle
        self._last: tuple[int, Tensor] = (-1, torch.empty(0))

    def locate(self, batch: int) -> tuple[int, int]:
        """The group of batch `batch` of this stream, and how many batches of that group are before it."""
        if len(self.numbers) == 1:
            return self.numbers[0], batch
        # After e passes the number of finished batches lies between e * rate - groups and e * rate.
        low = max(0, int(batch / self.rate) - 2)
        high = int((batch + 1 + len(self.numbers)) / self.rate) + 2
        epoch = bisect.bisect_right(range(high + 1), batch, lo=low, key=lambda e: sum(self._over(e))) - 1
        over = self._over(epoch)
        order, place = self._order(epoch), batch - sum(over)
        group = int(order[place])
        return self.numbers[group], over[group] + int((order[:place] == group).sum())

    def _over(self, epoch: int) -> list[int]:
        """Batches of each group that lie before pass `epoch`."""
        return [epoch * clips // batch for clips, batch in self._sizes]

    def _order(self, epoch: int) -> Tensor:
        if self._last[0] != epoch:
            now, then = self._over(epoch), self._over(epoch + 1)
            counts = torch.tensor([after - before for before, after in zip(now, then, strict=True)])
            groups = torch.repeat_interleave(torch.arange(len(counts)), counts)
            if self._shuffle:
                groups = groups[_permutation(len(groups), "groups", self._seed, epoch)]
            self._last = (epoch, groups)
        return self._last[1]


def _permutation(length: int, *seed: int | str) -> Tensor:
    return torch.randperm(length, generator=torch.Generator().manual_seed(stable_seed(*seed)))


class FixedPlan:
    """The clips of each group once, in order, dealt to the ranks of `mesh.data` in turn.

    `Group.batch` is that of one rank here. All ranks get equally many clips, since a forward pass may be collective:
    where the clips of a group do not divide, its first ones fill up with weight 0. A clip that replaces a broken one
    has weight 0 as well.
    """

    def __init__(self, groups: Sequence[Group], mesh: Mesh | None = None) -> None:
        self.groups, self.mesh = groups, mesh or Mesh.single()
        self._starts = [0]  # the first batch of each group
        self._samples = [0]  # the first sample of each group
        for group in groups:
            self._starts.append(self._starts[-1] - (-self._clips_of_rank(group) // group.batch))
            self._samples.append(self._samples[-1] + self._clips_of_rank(group) * self.mesh.data)

    @property
    def batches(self) -> int:
        return self._starts[-1]

    def _clips_of_rank(self, group: Group) -> int:
        return -(-len(group.clips) // self.mesh.data)

    def attempts(self, batch: int) -> Iterator[list[Slot]]:
        """The slots of a batch; then, for where no clip of its group can be read, others' without weight."""
        number = bisect.bisect_right(self._starts, batch) - 1
        group, start = self.groups[number], (batch - self._starts[number]) * self.groups[number].batch
        turns = range(start, min(start + group.batch, self._clips_of_rank(group)))
        samples = [turn * self.mesh.data + self.mesh.data_rank for turn in turns]
        first = self._samples[number]
        yield [
            Slot(first + s, self._candidates(group, s), float(s < len(group.clips)), replaced_weight=0.0)
            for s in samples
        ]
        for other in self.groups:
            if other is not group:
                few = samples[: other.batch]
                yield [Slot(first + s, self._candidates(other, s), 0.0, replaced_weight=0.0) for s in few]

    def _candidates(self, group: Group, sample: int) -> Iterator[tuple[int, int]]:
        clips = len(group.clips)
        return ((int(group.clips[(sample + attempt) % clips]), 0) for attempt in range(clips))
