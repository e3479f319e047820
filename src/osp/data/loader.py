"""Loaders with a plan: which clip is read when follows from a few integers, so a stopped run goes on exactly.

The training plan numbers the samples of a run 0, 1, 2, ... without end. Sample s is read in pass s // clips over the
source, at place s % clips of a permutation that follows from (seed, pass). Global batch b holds the samples b * G ..
b * G + G - 1 (G = batch size of a device x world size) and rank r takes the r-th run of them. So

- the state of a run is one count, the batches done; it is the same on every rank (Lightning keeps rank 0's only);
- the clips of a global batch depend on the seed and G alone: any split into ranks and any number of workers see the
  same, so nothing is split "by node" or "by worker", and no distributed sampler may be added on top;
- a run goes on at another number of workers, and at another world size if G stays.
"""

import itertools
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from osp.data.sources import ClipSource, stable_seed
from osp.data.video import ClipError
from osp.errors import DataError, OspError, UsageError

log = logging.getLogger(__name__)

GIVE_UP_AFTER = 1000
"""So many broken clips in a row (or all clips of a smaller source) are no accident: the run ends."""


class Batch(TypedDict):
    """What both loaders give; B is the batch size of one device."""

    video: Tensor  # uint8 `B C T H W`
    caption: list[str]
    key: list[str]
    fps: Tensor  # float32 `B`, frames a second
    broken: int  # clips that could not be read and were replaced
    sample: Tensor  # int64 `B`: number of the sample, unique in a training run
    weight: Tensor  # float32 `B`: 1, or 0 for a clip that must not count in an average (FixedLoader only)


@dataclass(frozen=True)
class Slot:
    """One place in a batch: the (index, draw) pairs to try until one can be read."""

    sample: int
    candidates: Iterator[tuple[int, int]]
    weight: float = 1.0
    replaced_weight: float = 1.0  # the weight if the first candidate is broken


@dataclass(frozen=True)
class TrainPlan:
    """The endless plan of the module's docstring, as one rank sees it."""

    clips: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    shuffle: bool = True

    def slots(self, batch: int) -> list[Slot]:
        """What this rank reads for global batch `batch`."""
        first = (batch * self.world_size + self.rank) * self.batch_size
        return [Slot(sample, self._candidates(sample)) for sample in range(first, first + self.batch_size)]

    def _candidates(self, sample: int) -> Iterator[tuple[int, int]]:
        # A broken clip is replaced by those after it in the plan, so that a resumed run replaces it by the same one.
        for attempt in range(2 * self.clips):  # two passes hold every clip, wherever they begin
            epoch, place = divmod(sample + attempt, self.clips)
            index = int(_permutation(self.clips, self.seed, epoch)[place]) if self.shuffle else place
            # `attempt` too: the replacement differs from its clip's own turn in window and flip.
            yield index, stable_seed("draw", self.seed, epoch, attempt)


@lru_cache(maxsize=2)  # a batch may lie across the end of a pass
def _permutation(clips: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(clips, generator=torch.Generator().manual_seed(stable_seed("order", seed, epoch)))


@dataclass(frozen=True)
class FixedPlan:
    """Clips 0 .. clips - 1 once, in order, dealt to the ranks in turn.

    All ranks get equally many clips, since a forward pass may be collective: where `clips` does not divide, the first
    clips fill up with weight 0. A clip that replaces a broken one has weight 0 as well.
    """

    clips: int
    batch_size: int
    rank: int = 0
    world_size: int = 1

    @property
    def batches(self) -> int:
        return -(-self._clips_of_rank // self.batch_size)

    @property
    def _clips_of_rank(self) -> int:
        return -(-self.clips // self.world_size)

    def slots(self, batch: int) -> list[Slot]:
        first, last = batch * self.batch_size, min((batch + 1) * self.batch_size, self._clips_of_rank)
        samples = [turn * self.world_size + self.rank for turn in range(first, last)]
        return [Slot(s, self._candidates(s), float(s < self.clips), replaced_weight=0.0) for s in samples]

    def _candidates(self, sample: int) -> Iterator[tuple[int, int]]:
        return (((sample + attempt) % self.clips, 0) for attempt in range(self.clips))


class ResumableLoader:
    """Endless, exactly resumable training batches of one rank (the plan is described above).

    Args:
        source: the clips.
        batch_size: clips in a batch of one device.
        seed: of the order, the windows and the flips.
        workers: processes that read ahead, whole batches each; 0 reads in the training process.
        rank, world_size: which part of each global batch is read here.
        shuffle: a new order in every pass; False keeps the source's.
        batches_per_step: how many batches step `step` (0, 1, ...) of the optimiser needs; one iteration then gives a
            list of so many. None: one iteration gives one batch.
        prefetch: batches that each worker reads ahead.

    `len` is a nominal epoch: the steps that read about every clip once. Each `iter` gives so many and goes on where
    the last one stopped, also in the middle of an epoch (Lightning counts the steps of an epoch itself). The loader is
    sized on purpose: Lightning fetches a batch ahead from others, and the state would run ahead of the training.

    The state counts what was handed out, never what workers have read ahead. Under Lightning it lies in
    `checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]`; Lightning ignores that for a checkpoint of an
    epoch's end, which `osp.data.datamodule.ClipDataModule` makes good.

    A clip that cannot be read is replaced by the next one of the plan, logged once and counted in `broken`.

    Raises:
        UsageError: a setting makes no sense, or `load_state_dict` gets the state of another plan.
        DataError: the source is empty; while iterating: GIVE_UP_AFTER clips in a row are broken, or a worker died.
    """

    def __init__(
        self,
        source: ClipSource,
        *,
        batch_size: int,
        seed: int,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        batches_per_step: Callable[[int], int] | None = None,
        prefetch: int = 2,
    ) -> None:
        _check(source, batch_size, workers, rank, world_size, prefetch)
        self.source, self.workers, self.prefetch = source, workers, prefetch
        self.plan = TrainPlan(len(source), batch_size, seed, rank, world_size, shuffle)
        self.batches_per_step = batches_per_step
        self.steps = 0  # handed out, as are `batches`
        self.batches = 0
        self._fingerprint = source.fingerprint()
        self._reported: set[int] = set()
        # One reader serves all epochs, so that workers start once and read on during validation. Lightning sets
        # `_iterator` to None when the fit ends, which stops them.
        self._iterator: Iterator[Batch] | None = None
        self._next_read = -1  # the batch that `_iterator` gives next

    @property
    def global_batch(self) -> int:
        """Clips in a batch of all devices together."""
        return self.plan.batch_size * self.plan.world_size

    def __len__(self) -> int:
        per_step = 1 if self.batches_per_step is None else self.batches_per_step(0)
        return max(1, len(self.source) // (self.global_batch * per_step))

    def __iter__(self) -> Iterator[Batch | list[Batch]]:
        for _ in range(len(self)):
            count = 1 if self.batches_per_step is None else self.batches_per_step(self.steps)
            batches = [self._read(self.batches + i) for i in range(count)]
            self.batches += count
            self.steps += 1
            yield batches[0] if self.batches_per_step is None else batches

    def _read(self, batch: int) -> Batch:
        if self._iterator is None or self._next_read != batch:
            self.close()
            numbers = itertools.count(batch)
            self._iterator = _read_batches(
                self.source, self.plan.slots, numbers, self.workers, self.prefetch, self._reported
            )
        self._next_read = -1  # unknown if the next line is interrupted
        result = next(self._iterator)
        self._next_read = batch + 1
        return result

    def close(self) -> None:
        """Stops the workers; the state stays, and iterating starts new ones."""
        self._iterator = None

    def state_dict(self) -> dict[str, Any]:
        """The place in the plan, and what the plan is made of. The same on all ranks."""
        return {"steps": self.steps, "batches": self.batches} | self._identity()

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.plan.seed,
            "shuffle": self.plan.shuffle,
            "global_batch": self.global_batch,
            "clips": len(self.source),
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`. Raises UsageError if it belongs to another seed, global batch or source."""
        mine = self._identity()
        missing = ({"steps", "batches"} | mine.keys()) - state.keys()
        if missing:
            raise UsageError(
                f"cannot resume: the checkpoint's loader state lacks {', '.join(sorted(missing))}, "
                "so another loader wrote it; start a new run from its weights instead"
            )
        names = {"global_batch": "global batch (batch_size x devices)", "fingerprint": "clips or their decoding"}
        changed = [
            f"{names.get(key, key)} was {state[key]}, is {value}" for key, value in mine.items() if state[key] != value
        ]
        if changed:
            raise UsageError(
                f"cannot resume, the order of the training clips would change: {'; '.join(changed)}. "
                "Set this back to resume, or start a new run from the checkpoint's weights"
            )
        self.steps, self.batches = state["steps"], state["batches"]


class FixedLoader:
    """The clips of a source once each, in the same order in every pass, one rank's share of them.

    For validation. All ranks get equally many batches; `weight` (see FixedPlan) is 0 where a clip only fills a batch,
    so averages weighted by it count each readable clip exactly once over all ranks. A batch, on a rank without any
    clip of its own, may have weight 0 throughout. Windows and flips are those of draw 0.

    Raises:
        UsageError: a setting makes no sense.
        DataError: the source is empty; while iterating: no clip can be read, or a worker died.
    """

    def __init__(
        self,
        source: ClipSource,
        *,
        batch_size: int,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        prefetch: int = 2,
    ) -> None:
        _check(source, batch_size, workers, rank, world_size, prefetch)
        self.source, self.workers, self.prefetch = source, workers, prefetch
        self.plan = FixedPlan(len(source), batch_size, rank, world_size)
        self._reported: set[int] = set()

    def __len__(self) -> int:
        return self.plan.batches

    def __iter__(self) -> Iterator[Batch]:
        numbers = range(self.plan.batches)
        return _read_batches(self.source, self.plan.slots, numbers, self.workers, self.prefetch, self._reported)


def _check(source: ClipSource, batch_size: int, workers: int, rank: int, world_size: int, prefetch: int) -> None:
    for name, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0), ("prefetch", prefetch, 1)):
        if value < least:
            raise UsageError(f"{name}={value}: must be at least {least}")
    if not 0 <= rank < world_size:
        raise UsageError(f"rank={rank}, world_size={world_size}: a rank lies between 0 and world_size - 1")
    if len(source) == 0:
        raise DataError(f"no clips to read: the source ({source.fingerprint()}) is empty")


Failures = dict[int, str]
"""Index of a broken clip -> "KEY: reason"."""


class _Batches(Dataset):
    """Batch numbers -> batches; runs in the workers, which torch limits to one thread each.

    The end of the run is returned, not raised: a worker would wrap the error's one line into a traceback.
    """

    def __init__(self, source: ClipSource, slots: Callable[[int], list[Slot]]) -> None:
        self.source, self.slots = source, slots

    def __getitem__(self, batch: int) -> tuple[Batch, Failures] | OspError:
        try:
            return _read_batch(self.source, self.slots(batch))
        except OspError as error:
            return error


def _read_batch(source: ClipSource, slots: Iterable[Slot]) -> tuple[Batch, Failures]:
    clips, samples, weights = [], [], []
    broken, failures = 0, Failures()
    for slot in slots:
        clip, failed = _read_first(source, slot.candidates)
        clips.append(clip)
        samples.append(slot.sample)
        weights.append(slot.replaced_weight if failed else slot.weight)
        broken += len(failed)
        failures |= failed
    batch = Batch(
        video=torch.stack([clip["video"] for clip in clips]),
        caption=[clip["caption"] for clip in clips],
        key=[clip["key"] for clip in clips],
        fps=torch.tensor([clip["fps"] for clip in clips], dtype=torch.float32),
        broken=broken,
        sample=torch.tensor(samples, dtype=torch.int64),
        weight=torch.tensor(weights, dtype=torch.float32),
    )
    return batch, failures


def _read_first(source: ClipSource, candidates: Iterator[tuple[int, int]]) -> tuple[dict[str, Any], Failures]:
    failed = Failures()
    reason = ""
    for index, draw in candidates:
        if index in failed:
            continue
        try:
            return source.read(index, draw), failed
        except ClipError as error:
            reason = failed[index] = str(error)
        if len(failed) >= GIVE_UP_AFTER:
            break
    raise DataError(
        f"{len(failed)} clips in a row cannot be read (of {len(source)}), the last one: {reason}; "
        "check that the clips are complete and fit the settings for training"
    )


def _read_batches(
    source: ClipSource,
    slots: Callable[[int], list[Slot]],
    batches: Iterable[int],
    workers: int,
    prefetch: int,
    reported: set[int],
) -> Iterator[Batch]:
    """The numbered batches in order; broken clips are logged here, in the training process, once per clip."""
    reader = DataLoader(
        _Batches(source, slots),
        batch_size=None,  # an item is a whole batch
        collate_fn=_as_is,
        sampler=batches,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=torch.cuda.is_available(),
        # Workers never touch the GPU, so a fork is safe on Linux: they start at once and share the list of clips.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        generator=torch.Generator(),  # or torch draws from the global one here, and a resumed run would differ
    )
    try:
        for item in reader:
            if isinstance(item, OspError):
                raise item
            batch, failures = item
            for index, reason in failures.items():
                if index not in reported:
                    reported.add(index)
                    log.warning("broken clip, replaced by another: %s", reason)
            yield batch
    except (RuntimeError, OSError, EOFError) as error:
        # torch's way to tell that a worker died, or a queue that broke with it; "Caught ..." is an error of the source.
        if not workers or str(error).startswith("Caught "):
            raise
        raise DataError(
            f"a process that reads clips has died ({error!r}): out of memory, or "
            "ended from outside; use fewer workers or a smaller batch and resume from the last checkpoint"
        ) from error


def _as_is(item: Any) -> Any:
    return item
