"""Where training clips come from: the `ClipSource` protocol, and the clips of shard folders.

`ShardClips` reads all in one size, `BucketClips` each in the size that a bucket rule gives it.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import get_worker_info

from osp.data.buckets import Bucket, BucketRule, Shape, choose, make_buckets
from osp.data.shard_index import ClipEntry, read_index
from osp.data.video import ClipError, probe, read_clip
from osp.errors import DataError, UsageError

log = logging.getLogger(__name__)


class ClipSource(Protocol):
    """A numbered list of clips that can be read in any order, by any process.

    The loaders of `osp.data.loader` decide which clip is read when; a source only reads.
    """

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """One line that changes when the list of clips or the way they are decoded changes."""
        ...

    def read(self, index: int, draw: int) -> dict[str, Any]:
        """Clip `index` as {"video": uint8 `C T H W`, "caption": str, "key": str, "fps": float (frames a second)}.

        All that is random about the read (window, flip) comes from `draw`: the same (index, draw) gives the same
        tensor in any process. Raises `osp.data.video.ClipError` for a clip that cannot be used; the loaders replace it.
        """
        ...


class BucketSource(ClipSource, Protocol):
    """A source whose clips have several shapes. The loaders give batches of one bucket each."""

    def buckets(self) -> list[Bucket]:
        """Every clip in the one bucket whose shape it is read in."""
        ...


def stable_seed(*parts: int | str) -> int:
    """A seed below 2^63 made of `parts`; equal in every process and version of Python, unlike `hash`."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class FirstClips:
    """The first so many clips of a source, or all if it has fewer. Raises UsageError for less than one."""

    def __init__(self, source: ClipSource, clips: int) -> None:
        if clips < 1:
            raise UsageError(f"train_clips or val_clips is {clips}: must be at least 1, or null for all")
        self.source, self.clips = source, clips

    def __getattr__(self, name: str) -> Any:
        # What only some sources have: `buckets`, `collate`, `identity`.
        if name in ("source", "clips") or name.startswith("__"):  # a copy that is still empty
            raise AttributeError(name)
        if name == "buckets":
            inner = self.source.buckets  # type: ignore[attr-defined]
            return lambda: _below(inner(), len(self))
        return getattr(self.source, name)

    def __len__(self) -> int:
        return min(self.clips, len(self.source))

    def fingerprint(self) -> str:
        return f"first {len(self)} of {self.source.fingerprint()}"

    def read(self, index: int, draw: int) -> dict[str, Any]:
        """See `ClipSource.read`."""
        return self.source.read(index, draw)


class ShardClips:
    """The clips of a shard folder, decoded to one size and length.

    Args:
        path: the folder that `osp shards` wrote, any folder of WebDataset tars, or one of videos and images.
        frames, height, width: the size of every clip (covering resize that keeps the aspect, then centre crop).
        stride: take every `stride`-th frame; excludes `fps`.
        fps: take the frames nearest to this rate, frames a second; None keeps the file's own frames.
        random_start: the window lies anywhere in the clip, else at its beginning (for validation: always the same).
        flip: mirror half of the reads left to right.

    Clips whose record says that they are too short, and images unless `frames` is 1, are left out here; what only
    decoding can tell (a foreign shard without frame counts, a damaged file) is a ClipError of `read`.

    Raises:
        DataError: the folder is not readable, or no clip in it is long enough.
        UsageError: `frames`, `height`, `width`, `stride` or `fps` make no sense.
    """

    def __init__(
        self,
        path: str | Path,
        frames: int,
        height: int,
        width: int,
        stride: int = 1,
        fps: float | None = None,
        random_start: bool = True,
        flip: bool = False,
    ) -> None:
        for name, value in (("frames", frames), ("height", height), ("width", width)):
            if value < 1:
                raise UsageError(f"{name}={value}: must be at least 1")
        self.decoding = Decoding(stride, fps, random_start, flip)
        self.path = Path(path)
        self.shape = Shape(frames, height, width)

        listed = read_index(path)
        self.entries = [entry for entry in listed if _fits(entry.record, frames, stride, fps)]
        left_out = len(listed) - len(self.entries)
        if not self.entries:
            rate = f" at {fps:g} fps" if fps is not None else f" with stride {stride}" if stride > 1 else ""
            raise DataError(
                f"{path}: none of its {len(listed)} clips is long enough for frames={frames}{rate} "
                f"(the longest: {_longest(listed)}); ask for fewer frames or less time between them, "
                "or make shards of longer clips"
            )
        if left_out:
            log.info("%s: %d of %d clips are too short and left out", path, left_out, len(listed))

    def __len__(self) -> int:
        return len(self.entries)

    def fingerprint(self) -> str:
        return f"shards {self.shape} {self.decoding} {_listing(self.entries)}"

    def read(self, index: int, draw: int) -> dict[str, Any]:
        """See `ClipSource.read`; the window and the flip come from a generator seeded by (key, draw)."""
        return self.decoding.read(self.entries[index], self.shape, draw)


class BucketClips:
    """The clips of shard folders, each decoded to the shape that a rule gives it.

    Args:
        path: as for `ShardClips`; several folders are read as one.
        rule: what gives each clip its shape (`osp.data.buckets`).
        stride, fps, random_start, flip: as for `ShardClips`. The rule counts frames at that stride or rate.
        min_clips: shapes that fewer clips than these have are left out, with their clips.

    A clip is scaled until it covers its shape, and cropped at the centre; frames are those of a window that the draw
    sets. Clips that no shape suits are left out and counted in `dropped` (reason -> clips). So are those of folders
    without an index that tells the size: `osp shards` writes one.

    Raises:
        DataError: a folder is not readable, or no clip has a shape.
        UsageError: `stride`, `fps` or `min_clips` make no sense.
    """

    def __init__(
        self,
        path: str | Path | Sequence[str | Path],
        rule: BucketRule,
        stride: int = 1,
        fps: float | None = None,
        random_start: bool = True,
        flip: bool = False,
        min_clips: int = 1,
    ) -> None:
        self.decoding = Decoding(stride, fps, random_start, flip)
        self.rule = rule
        paths = [path] if isinstance(path, str | Path) else list(path)
        listed = [entry for folder in paths for entry in read_index(folder)]
        sizes = [clip_size(entry.record, stride, fps) for entry in listed]
        kept, self._shapes, self.dropped = choose(sizes, rule, min_clips)
        self.entries = [listed[number] for number in kept]
        self._buckets = make_buckets(self._shapes, rule)
        if not self.entries:
            reasons = ", ".join(f"{clips} {reason}" for reason, clips in self.dropped.items())
            raise DataError(
                f"{', '.join(map(str, paths))}: no bucket has a clip ({reasons}); "
                "allow fewer tokens or frames, or make shards of larger clips"
            )

    def __len__(self) -> int:
        return len(self.entries)

    def buckets(self) -> list[Bucket]:
        """See `BucketSource.buckets`."""
        return self._buckets

    def fingerprint(self) -> str:
        shapes = hashlib.sha256(repr([tuple(shape) for shape in self._shapes]).encode()).hexdigest()[:16]
        return f"buckets {shapes} {self.decoding} {_listing(self.entries)}"

    def read(self, index: int, draw: int) -> dict[str, Any]:
        """See `ClipSource.read`; the window and the flip come from a generator seeded by (key, draw)."""
        return self.decoding.read(self.entries[index], self._shapes[index], draw)


class JoinedClips:
    """The clips of several sources, one after the other; of sources with buckets also the buckets are joined.

    Sources of features must have the same encoders.

    Raises:
        UsageError: no source, or sources that do not go together.
    """

    def __init__(self, sources: Sequence[ClipSource]) -> None:
        self.sources = list(sources)
        if len({type(source) for source in self.sources}) != 1:
            raise UsageError("joined clips: give at least one source, and all of the same kind")
        self._starts = [0, *accumulate(len(source) for source in self.sources)]
        for source in self.sources:
            if getattr(source, "identity", None) != getattr(self.sources[0], "identity", None):
                raise UsageError("joined clips: these features were made by different encoders")

    def __getattr__(self, name: str) -> Any:
        # What only some sources have: `buckets`, `dropped`, `collate`, `identity`.
        if name in ("sources", "_starts") or name.startswith("__"):  # a copy that is still empty
            raise AttributeError(name)
        first = getattr(self.sources[0], name)
        if name == "dropped":
            return sum((Counter(getattr(source, name)) for source in self.sources), Counter())
        return self._join_buckets if name == "buckets" else first

    def __len__(self) -> int:
        return self._starts[-1]

    def fingerprint(self) -> str:
        return " + ".join(source.fingerprint() for source in self.sources)

    def read(self, index: int, draw: int) -> dict[str, Any]:
        """See `ClipSource.read`."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.sources[number].read(index - self._starts[number], draw)

    def _join_buckets(self) -> list[Bucket]:
        clips: dict[tuple[Shape, int], list[Any]] = {}
        for start, source in zip(self._starts, self.sources, strict=False):
            for bucket in source.buckets():  # type: ignore[attr-defined]
                clips.setdefault((bucket.shape, bucket.tokens), []).append(bucket.clips + start)
        return [Bucket(*key, np.concatenate(clips[key])) for key in sorted(clips)]


@dataclass(frozen=True)
class Decoding:
    """Which frames of a clip are read, and whether it is mirrored; see `ShardClips`."""

    stride: int = 1
    fps: float | None = None
    random_start: bool = True
    flip: bool = False

    def __post_init__(self) -> None:
        if self.stride < 1:
            raise UsageError(f"stride={self.stride}: must be at least 1")
        if self.fps is not None and (self.fps <= 0 or self.stride != 1):
            raise UsageError(f"fps={self.fps}, stride={self.stride}: give a positive fps or a stride, not both")

    def __str__(self) -> str:
        rate = f"fps={self.fps}" if self.fps else f"stride={self.stride}"
        return f"{rate} random_start={self.random_start} flip={self.flip}"

    def read(self, entry: ClipEntry, shape: Shape, draw: int) -> dict[str, Any]:
        """One clip, as `ClipSource.read`; the window and the flip come from a generator seeded by (key, draw)."""
        try:
            data = entry.source()
        except DataError as error:  # a shard cut short costs its own clips only
            raise ClipError(entry.key, str(error)) from error
        generator = torch.Generator().manual_seed(stable_seed(entry.key, draw))
        mirrored = bool(torch.rand((), generator=generator) < 0.5)  # always drawn: `flip` does not move the windows
        video = read_clip(
            data,
            frames=shape.frames,
            size=(shape.height, shape.width),
            stride=self.stride,
            fps=self.fps,
            generator=generator if self.random_start else None,
            name=entry.key,
            threads=0 if get_worker_info() is None else 1,
        )
        if self.flip and mirrored:
            video = video.flip(-1)
        fps = self.fps or (entry.record.get("fps") or probe(data, entry.key).fps) / self.stride
        return {"video": video, "caption": str(entry.record.get("caption", "")), "key": entry.key, "fps": fps}


def clip_size(record: Mapping[str, Any], stride: int = 1, fps: float | None = None) -> Shape | None:
    """Frames at that stride or rate, height and width of a clip by its record; None if that does not tell them."""
    height, width = record.get("height"), record.get("width")
    if not height or not width:
        return None
    if record.get("kind") == "image":
        return Shape(1, height, width)
    has, rate = record.get("frames"), record.get("fps")
    if not has or (fps is not None and not rate):
        return None
    frames = (has - 1) // stride + 1 if fps is None else int((has - 0.49) / (rate or 1) * fps) + 1
    if not _fits(record, frames, stride, fps):  # a rounding
        frames -= 1
    return Shape(frames, height, width)


def _listing(entries: Sequence[ClipEntry]) -> str:
    listing = hashlib.sha256()
    for entry in entries:
        listing.update(f"{entry.key} {entry.size}\n".encode())
    return f"clips={len(entries)} list={listing.hexdigest()[:16]}"


def _below(buckets: list[Bucket], clips: int) -> list[Bucket]:
    """The buckets of the first so many clips."""
    kept = [(bucket, bucket.clips[bucket.clips < clips]) for bucket in buckets]
    return [Bucket(bucket.shape, bucket.tokens, few) for bucket, few in kept if len(few)]


def _fits(record: Mapping[str, Any], frames: int, stride: int, fps: float | None) -> bool:
    """False if the record says that `read_clip` would find the clip too short; what it does not say is tried."""
    if record.get("kind") == "image":
        return frames == 1
    has, rate = record.get("frames"), record.get("fps")
    if has is None:
        return True
    if fps is None:
        return bool(has >= (frames - 1) * stride + 1)
    if not rate:
        return True
    # As read_clip: the last frame counts half its time. A hundredth of a frame is for a rounded rate.
    return bool((frames - 1) / fps <= (has - 0.49) / rate)


def _longest(entries: list[ClipEntry]) -> str:
    record = max((entry.record for entry in entries), key=lambda record: record.get("frames", 1))
    if record.get("kind") == "image":
        return "an image"
    return f"{record['frames']} frames" + (f" at {record['fps']:g} fps" if record.get("fps") else "")
