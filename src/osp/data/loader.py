"""Loaders that follow a plan (`osp.data.plan`): a stopped run goes on exactly.

- The state of a run is one count, the batches done; it is the same in every process (Lightning keeps rank 0's only).
- The clips of a global batch depend on the seed and its size alone: any split into processes and any number of workers
  see the same, so nothing is split "by node" or "by worker", and no distributed sampler may be added on top.
- Processes that share clips (`osp.devices.mesh`) read the same ones.
- A run goes on at another number of workers, and on another mesh if the global batches keep their size.
- A batch has one shape. Of a source with buckets, all processes read the same bucket in the same step.
"""

import itertools
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypedDict, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from osp.checks import check_number
from osp.data.buckets import batch_sizes
from osp.data.handover import begin_worker, received, sendable
from osp.data.media.video import ClipError
from osp.data.plan import FixedPlan, Group, Slot, TrainPlan
from osp.data.sources import ClipSource
from osp.devices import choose_device
from osp.devices.mesh import Mesh
from osp.documents import check_form, printable
from osp.errors import DataError, OspError, UsageError

log = logging.getLogger(__name__)

Waiting = Callable[[], AbstractContextManager[None]]
"""Gives the context that a loader enters while it waits for a batch."""

_STEP = "global batch (batch_size x devices x accumulate)"
_COUNTS = {"steps": 10**12, "batches": 10**12, "global_batch": 10**9}  # of a loader's state, and the most of each
_PLAIN = (float, str, bool, None)

GIVE_UP_AFTER = 1000
"""So many broken clips in a row (or all clips of a smaller source) are no accident: the run ends."""


class Batch(TypedDict):
    """A batch, as both loaders give it for sources that read videos; B is the batch size of one device.

    Other sources decide by `collate` what stands in the place of the first four (`osp.data.features.format`).
    """

    video: Tensor  # uint8 `B C T H W`
    caption: list[str]
    key: list[str]
    fps: Tensor  # float32 `B`, frames a second
    broken: int  # clips that could not be read and were replaced
    sample: Tensor  # int64 `B`: number of the sample, unique in a training run
    weight: Tensor  # float32 `B`: 1, or 0 for a clip that must not count in an average (FixedLoader only)


class ResumableLoader:
    """Endless, exactly resumable training batches of one process, by a `TrainPlan`.

    Args:
        source: the clips. If it has buckets, every batch is of one of them.
        batch_size: clips in a batch of one device; None with `batch_tokens`.
        batch_tokens: for a source with buckets, instead of `batch_size`: the most tokens in a batch of one device. Each
            bucket has its own batch size by it.
        image_ratio: for a source with buckets: the part of the batches that are images, evenly spread; None: images are
            buckets like the others.
        devices: how many devices the batches are made for. None: `mesh.data`. A run that began on 8 devices with
            `batch_tokens` goes on at 2 with `devices=8`, and each then reads four times as many clips.
        seed: of the order, the windows and the flips.
        workers: processes that read ahead, whole batches each; 0 reads in the training process.
        mesh: which part of each global batch is read here; None: all of it.
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
        batch_size: int | None = None,
        seed: int,
        workers: int = 0,
        mesh: Mesh | None = None,
        shuffle: bool = True,
        batches_per_step: Callable[[int], int] | None = None,
        prefetch: int = 2,
        batch_tokens: int | None = None,
        image_ratio: float | None = None,
        devices: int | None = None,
    ) -> None:
        mesh = mesh or Mesh.single()
        _check(source, workers, prefetch)
        devices = mesh.data if devices is None else devices
        check_number("devices", devices, least=1, whole=True)
        if devices % mesh.data:
            raise UsageError(f"devices={devices}: must be a multiple of the {mesh.data} devices that there are")
        groups = _groups(source, batch_size, batch_tokens, devices)
        _check_images(groups, image_ratio)
        self.source, self.workers, self.prefetch = source, workers, prefetch
        self.plan = TrainPlan(groups, seed, mesh, shuffle, image_ratio, source.order)
        self.batches_per_step = batches_per_step
        self._settings: dict[str, Any] = {}  # what a state tells of them, beside what it always tells
        if batch_tokens is not None:
            self._settings |= {"batch_tokens": batch_tokens, "devices": devices}
        if image_ratio is not None:
            self._settings |= {"image_ratio": image_ratio}
        self.steps = 0  # handed out, as are `batches`
        self.batches = 0
        self._fingerprint = source.fingerprint()
        self._reported: set[int] = set()
        # One reader serves all epochs, so that workers start once and read on during validation. Lightning sets
        # `_iterator` to None when the fit ends, which stops them.
        self._iterator: Iterator[Batch] | None = None
        self._next_read = -1  # the batch that `_iterator` gives next
        self.waiting: Waiting = nullcontext

    @property
    def global_batch(self) -> int:
        """Clips in a batch of all devices together; the most, where that varies."""
        return max(group.batch for group in self.plan.groups)

    def __len__(self) -> int:
        per_step = 1 if self.batches_per_step is None else self.batches_per_step(0)
        return max(1, int(self.plan.epoch) // per_step)

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
                self.source, self.plan.attempts, numbers, self.workers, self.prefetch, self._reported
            )
        self._next_read = -1  # unknown if the next line is interrupted
        with self.waiting():
            result = next(self._iterator)
        self._next_read = batch + 1
        return result

    def close(self) -> None:
        """Stops the workers; the state stays, and iterating starts new ones."""
        self._iterator = None

    def state_dict(self) -> dict[str, Any]:
        """The place in the plan, and what the plan is made of. The same in all processes."""
        return {"steps": self.steps, "batches": self.batches} | self._identity()

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.plan.seed,
            "shuffle": self.plan.shuffle,
            "global_batch": self.global_batch,
            "clips": len(self.source),
            "fingerprint": self._fingerprint,
        } | self._settings

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state`, also with another split of the clips of a step into batches and devices.

        Raises UsageError if it belongs to another seed, source or number of clips in a step, DataError if it is none.
        """
        counts = {f"{name}?": int for name in _COUNTS}
        check_form(state, {**counts, ...: _PLAIN}, "the loader's state to go on from")
        for name, most in _COUNTS.items():
            check_number(
                f"the loader's state to go on from: {name}", state.get(name), 0, most, null="-", error=DataError
            )
        mine = self._identity()
        missing = ({"steps", "batches"} | mine.keys()) - state.keys()
        if missing:
            raise UsageError(
                f"cannot resume: the checkpoint's loader state lacks {', '.join(sorted(missing))}, "
                "so another loader wrote it; start a new run from its weights instead"
            )
        names = {"global_batch": _STEP, "fingerprint": "clips or their decoding"}
        mine |= {key: None for key in ("batch_tokens", "devices", "image_ratio") if key in state and key not in mine}
        batches = self._batches_in(state["steps"], state["batches"])
        if state["steps"] and len(self.plan.groups) == 1:  # samples are numbered through, however batches split them
            clips = [state["batches"] * state["global_batch"], batches * self.global_batch]
            state = {**state, "global_batch": clips[0] / state["steps"]}
            mine["global_batch"] = clips[1] / state["steps"]
        elif batches != state["batches"]:
            so_far = "batches so far (accumulate)"
            state, mine = {**state, so_far: state["batches"]}, mine | {so_far: batches}
        changed = [
            f"{names.get(key, key)} was {_whole(state[key])}, is {_whole(value)}"
            for key, value in mine.items()
            if state[key] != value
        ]
        if changed:
            raise UsageError(
                f"cannot resume, the order of the training clips would change: {'; '.join(changed)}. "
                "Set this back to resume, or start a new run from the checkpoint's weights"
            )
        self.steps, self.batches = state["steps"], batches

    def _batches_in(self, steps: int, said: int) -> int:
        """How many batches so many steps take; what a state says where steps are not counted in batches."""
        if self.batches_per_step is None:
            return said if len(self.plan.groups) > 1 else steps
        return sum(map(self.batches_per_step, range(steps)))


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


class FixedLoader:
    """The clips of a source once each, in the same order in every pass, one process's share of them.

    For validation. All processes get equally many batches; `weight` (see FixedPlan) is 0 where a clip only fills a
    batch, so averages weighted by it count each readable clip exactly once over all ranks of `mesh.data`. A batch, on a
    rank without any clip of its own, may have weight 0 throughout. Windows and flips are those of draw 0. Of a source
    with buckets one bucket is read after the other; `batch_size` and `batch_tokens` are as in `ResumableLoader`.

    Raises:
        UsageError: a setting makes no sense.
        DataError: the source is empty; while iterating: no clip can be read, or a worker died.
    """

    def __init__(
        self,
        source: ClipSource,
        *,
        batch_size: int | None = None,
        workers: int = 0,
        mesh: Mesh | None = None,
        prefetch: int = 2,
        batch_tokens: int | None = None,
    ) -> None:
        _check(source, workers, prefetch)
        self.source, self.workers, self.prefetch = source, workers, prefetch
        self.plan = FixedPlan(_groups(source, batch_size, batch_tokens, devices=1), mesh)
        self._reported: set[int] = set()
        self.waiting: Waiting = nullcontext

    def __len__(self) -> int:
        return self.plan.batches

    def __iter__(self) -> Iterator[Batch]:
        numbers = range(self.plan.batches)
        batches = _read_batches(self.source, self.plan.attempts, numbers, self.workers, self.prefetch, self._reported)
        for _ in numbers:
            with self.waiting():
                batch = next(batches)
            yield batch


def _check(source: ClipSource, workers: int, prefetch: int) -> None:
    check_number("workers", workers, least=0, whole=True)
    check_number("prefetch", prefetch, least=1, whole=True)
    if len(source) == 0:
        raise DataError(f"no clips to read: the source ({source.fingerprint()}) is empty")


def _groups(source: ClipSource, batch_size: int | None, batch_tokens: int | None, devices: int) -> list[Group]:
    for name, value in (("batch_size", batch_size), ("batch_tokens", batch_tokens)):
        if value is not None:
            check_number(name, value, least=1, whole=True)
    if (batch_size is None) == (batch_tokens is None):
        raise UsageError(f"batch_size={batch_size}, batch_tokens={batch_tokens}: give one of them")
    buckets = source.buckets()
    if buckets is None:
        if batch_size is None:
            raise UsageError(f"batch_tokens={batch_tokens}: this source has no buckets; give batch_size instead")
        return [Group(range(len(source)), batch_size * devices)]
    sizes = [batch_size] * len(buckets) if batch_size is not None else batch_sizes(buckets, batch_tokens or 0)
    return [Group(bucket.clips, size * devices, bucket.is_image) for bucket, size in zip(buckets, sizes, strict=True)]


def _check_images(groups: list[Group], image_ratio: float | None) -> None:
    if image_ratio is None:
        return
    check_number("image_ratio", image_ratio, least=0, most=1)
    for is_image, name in ((True, "images"), (False, "videos")):
        if image_ratio != (0 if is_image else 1) and not any(group.is_image == is_image for group in groups):
            raise UsageError(f"image_ratio={image_ratio}: there are no {name} among the clips; leave it out")


Failures = dict[int, str]
"""Index of a broken clip -> "KEY: reason"."""


class _NoneReadable(DataError):
    """No clip of a whole group can be read."""

    def __init__(self, failures: Failures, clips: int) -> None:
        self.failures = failures
        super().__init__(
            f"{len(failures)} clips in a row cannot be read (of {clips}), the last one: {list(failures.values())[-1]}; "
            "check that the clips are complete and fit the settings for training"
        )

    def __reduce__(self) -> tuple[type[DataError], tuple[str]]:
        return DataError, (str(self),)  # what a worker sends is the line


class _Batches(Dataset):
    """Batch numbers -> batches; runs in the workers, which torch limits to one thread each.

    The end of the run is returned, not raised: a worker would wrap the error's one line into a traceback.
    """

    def __init__(self, source: ClipSource, attempts: Callable[[int], Iterator[list[Slot]]]) -> None:
        self.source, self.attempts = source, attempts

    def __getitem__(self, batch: int) -> tuple[Batch, Failures] | OspError:
        try:
            read, failures = _read_batch(self.source, self.attempts(batch))
        except OspError as error:
            return error
        return (read if get_worker_info() is None else sendable(read)), failures


def _read_batch(source: ClipSource, attempts: Iterator[list[Slot]]) -> tuple[Batch, Failures]:
    """The first of the attempts that can be read. All ranks take the same one: each has tried the whole group."""
    lost = Failures()
    for slots in attempts:
        try:
            batch, failures = _read_slots(source, slots)
        except _NoneReadable as error:
            lost |= error.failures
            if len(error.failures) >= GIVE_UP_AFTER:
                break
            continue
        batch["broken"] += len(lost)
        return batch, lost | failures
    raise _NoneReadable(lost, len(source))


def _read_slots(source: ClipSource, slots: Iterable[Slot]) -> tuple[Batch, Failures]:
    clips, samples, weights = [], [], []
    broken, failures = 0, Failures()
    for slot in slots:
        clip, failed = _read_first(source, slot.candidates)
        clips.append(clip)
        samples.append(slot.sample)
        weights.append(slot.replaced_weight if failed else slot.weight)
        broken += len(failed)
        failures |= failed
    batch = {
        **source.collate(clips),
        "broken": broken,
        "sample": torch.tensor(samples, dtype=torch.int64),
        "weight": torch.tensor(weights, dtype=torch.float32),
    }
    return cast(Batch, batch), failures


def _read_first(source: ClipSource, candidates: Iterator[tuple[int, int]]) -> tuple[dict[str, Any], Failures]:
    failed = Failures()
    for index, draw in candidates:
        if index in failed:
            continue
        try:
            return source.read(index, draw), failed
        except ClipError as error:
            failed[index] = str(error)
        if len(failed) >= GIVE_UP_AFTER:
            break
    raise _NoneReadable(failed, len(source))


def _read_batches(
    source: ClipSource,
    attempts: Callable[[int], Iterator[list[Slot]]],
    batches: Iterable[int],
    workers: int,
    prefetch: int,
    reported: set[int],
) -> Iterator[Batch]:
    """The numbered batches in order; broken clips are logged here, in the training process, once per clip."""
    reader = DataLoader(
        _Batches(source, attempts),
        batch_size=None,  # an item is a whole batch
        collate_fn=_as_is,
        sampler=batches,
        num_workers=workers,
        prefetch_factor=prefetch if workers else None,
        pin_memory=choose_device("auto").type != "cpu",
        # Workers never touch the GPU, so a fork is safe on Linux: they start at once and share the list of clips.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        worker_init_fn=begin_worker,
        generator=torch.Generator(),  # or torch draws from the global one here, and a resumed run would differ
    )
    try:
        for item in reader:
            if isinstance(item, OspError):
                raise item
            batch, failures = received(item[0]), item[1]
            for index, reason in failures.items():
                if index not in reported:
                    reported.add(index)
                    log.warning("broken clip, replaced by another: %s", printable(reason))
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
