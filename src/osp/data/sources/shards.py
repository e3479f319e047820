"""The clips of shard folders, in one size (`ShardClips`) or each in a size that a rule gives it (`BucketClips`)."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from osp.checks import check_number
from osp.data.buckets import Bucket, BucketRule, choose, make_buckets
from osp.data.media.limits import DEFAULT_LIMITS, Limits
from osp.data.media.part import WHOLE
from osp.data.media.shape import Shape
from osp.data.shards.entry import ClipEntry
from osp.data.shards.index import Listing, read_listing
from osp.data.sources.decoding import Decoding
from osp.data.sources.source import Elsewhere, ListedClips
from osp.data.sources.where import passing
from osp.errors import DataError

Folders = str | Path | Sequence[str | Path] | Elsewhere
"""The folders that clips are listed from, or shards that lie elsewhere."""


class ShardClips(ListedClips):
    """The clips of a shard folder, decoded to one size and length.

    Args:
        path: the folder that `osp shards` wrote, any folder of WebDataset tars, or one of videos and images; several
            folders are read as one. Or shards that lie elsewhere (`osp.data.streaming`).
        frames, height, width: the size of every clip (covering resize that keeps the aspect, then centre crop).
        stride: take every `stride`-th frame; excludes `fps`.
        fps: take the frames nearest to this rate, frames a second; None keeps the file's own frames.
        random_start: the window lies anywhere in the clip, and of several captions one is drawn; else the window is at
            the beginning and the caption is the first (for validation: always the same).
        flip: mirror half of the reads left to right.
        limits: what one file may cost.
        where: a condition on the records of clips, such as "aesthetic >= 4.75 and motion > 0.001"; others are left out
            (`osp.data.sources.where`). None: no clip is left out for its record's sake.
        aesthetic_words: captions get a sentence on the clip's aesthetic score (`osp.data.sources.words`).

    Clips whose record says that they are too short, and images unless `frames` is 1, are left out here; what only
    decoding can tell (a foreign shard without frame counts, a damaged file) is a ClipError of `read`.

    Raises:
        DataError: the folder is not readable, or no clip in it is long enough or meets the condition.
        UsageError: `frames`, `height`, `width`, `stride`, `fps` or `where` make no sense.
    """

    def __init__(
        self,
        path: Folders,
        frames: int,
        height: int,
        width: int,
        stride: int = 1,
        fps: float | None = None,
        random_start: bool = True,
        flip: bool = False,
        limits: Limits = DEFAULT_LIMITS,
        where: str | None = None,
        aesthetic_words: bool = False,
    ) -> None:
        for name, value in (("frames", frames), ("height", height), ("width", width)):
            check_number(name, value, 1, whole=True)
        self.decoding, self.mirrors = Decoding(stride, fps, random_start, flip, limits, aesthetic_words), flip
        self.shape = Shape(frames, height, width)
        paths, self.path, listing = _list_folders(path, limits)
        self.elsewhere = None if isinstance(path, str | Path | Sequence) else path
        self.passed_over = listing.left_out
        listed, self.dropped = passing(listing.entries, where, paths)
        self.entries = [entry for entry in listed if _fits(entry.record, frames, stride, fps)]
        if not self.entries:
            rate = f" at {fps:g} fps" if fps is not None else f" with stride {stride}" if stride > 1 else ""
            raise DataError(
                f"{paths}: none of its {len(listed)} clips is long enough for frames={frames}{rate} "
                f"(the longest: {_longest(listed)}); ask for fewer frames or less time between them, "
                "or make shards of longer clips"
            )
        if left_out := len(listed) - len(self.entries):
            self.dropped = {**self.dropped, f"that are too short for frames={frames}, or images": left_out}

    def fingerprint(self) -> str:
        return f"shards {self.shape} {self.decoding} {_listing(self.entries)}{self._sequence()}"

    def read(self, index: int, draw: int) -> dict[str, Any]:
        """See `ClipSource.read`; the window and the flip come from a generator seeded by (key, draw)."""
        return self.decoding.read(self.entries[index], self.shape, draw)


class BucketClips(ListedClips):
    """The clips of shard folders, each decoded to the shape that a rule gives it.

    Args:
        path: as for `ShardClips`; several folders are read as one.
        rule: what gives each clip its shape (`osp.data.buckets`).
        stride, fps, random_start, flip, limits, where, aesthetic_words: as for `ShardClips`. The rule counts frames at
            that stride or rate.
        min_clips: shapes that fewer clips than these have are left out, with their clips.

    A clip is scaled until it covers its shape, and cropped at the centre; frames are those of a window that the draw
    sets. Clips that no shape suits are left out and counted in `dropped` (reason -> clips). So are those of folders
    without an index that tells the size: `osp shards` writes one.

    Raises:
        DataError: a folder is not readable, or no clip has a shape or meets the condition.
        UsageError: `stride`, `fps`, `min_clips` or `where` make no sense.
    """

    def __init__(
        self,
        path: Folders,
        rule: BucketRule,
        stride: int = 1,
        fps: float | None = None,
        random_start: bool = True,
        flip: bool = False,
        min_clips: int = 1,
        limits: Limits = DEFAULT_LIMITS,
        where: str | None = None,
        aesthetic_words: bool = False,
    ) -> None:
        self.decoding, self.mirrors = Decoding(stride, fps, random_start, flip, limits, aesthetic_words), flip
        self.rule = rule
        paths, self.path, listing = _list_folders(path, limits)
        self.elsewhere = None if isinstance(path, str | Path | Sequence) else path
        self.passed_over = listing.left_out
        listed, failing = passing(listing.entries, where, paths)
        sizes = [clip_size(entry.record, stride, fps) for entry in listed]
        kept, self._shapes, unsuited = choose(sizes, rule, min_clips)
        self.dropped = {**failing, **unsuited}
        self.entries = [listed[number] for number in kept]
        self._buckets = make_buckets(self._shapes, rule)
        if not self.entries:
            reasons = ", ".join(f"{clips} {reason}" for reason, clips in self.dropped.items())
            raise DataError(
                f"{paths}: no bucket has a clip ({reasons}); "
                "allow fewer tokens or frames, or make shards of larger clips"
            )

    def buckets(self) -> list[Bucket]:
        """See `ClipSource.buckets`."""
        return self._buckets

    def fingerprint(self) -> str:
        shapes = hashlib.sha256(repr([tuple(shape) for shape in self._shapes]).encode()).hexdigest()[:16]
        return f"buckets {shapes} {self.decoding} {_listing(self.entries)}{self._sequence()}"

    def read(self, index: int, draw: int) -> dict[str, Any]:
        """See `ClipSource.read`; the window and the flip come from a generator seeded by (key, draw)."""
        return self.decoding.read(self.entries[index], self._shapes[index], draw)


def _list_folders(path: Folders, limits: Limits) -> tuple[str, Path | None, Listing]:
    """The clips of one or several folders: how errors call them, the folder if it is one, and what they hold."""
    if not isinstance(path, str | Path | Sequence):
        return str(path), path.folder, path.listing(limits)
    paths = [path] if isinstance(path, str | Path) else list(path)
    listings = [read_listing(folder, limits) for folder in paths]
    left_out = sum((Counter(listing.left_out) for listing in listings), Counter[str]())
    entries = [entry for listing in listings for entry in listing.entries]
    return ", ".join(map(str, paths)), Path(paths[0]) if len(paths) == 1 else None, Listing(entries, left_out)


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
        said = f" {entry.part}" if entry.part != WHOLE else ""
        if entry.record.get("recaptioned"):  # with other captions the same clip is another one to a model
            said += f" {entry.record.get('captions') or entry.record.get('caption')!r}"
        listing.update(f"{entry.key} {entry.size}{said}\n".encode("utf-8", "surrogatepass"))
    return f"clips={len(entries)} list={listing.hexdigest()[:16]}"


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
