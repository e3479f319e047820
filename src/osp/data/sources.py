"""Where training clips come from: the `ClipSource` protocol, and `ShardClips`, which reads a folder of shards."""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.data import get_worker_info

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
        for name, value in (("frames", frames), ("height", height), ("width", width), ("stride", stride)):
            if value < 1:
                raise UsageError(f"{name}={value}: must be at least 1")
        if fps is not None and (fps <= 0 or stride != 1):
            raise UsageError(f"fps={fps}, stride={stride}: give a positive fps or a stride, not both")
        self.path = Path(path)
        self.frames, self.height, self.width = frames, height, width
        self.stride, self.fps = stride, fps
        self.random_start, self.flip = random_start, flip

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
        listing = hashlib.sha256()
        for entry in self.entries:
            listing.update(f"{entry.key} {entry.size}\n".encode())
        rate = f"fps={self.fps}" if self.fps else f"stride={self.stride}"
        return (
            f"shards {self.frames}x{self.height}x{self.width} {rate} random_start={self.random_start} "
            f"flip={self.flip} clips={len(self.entries)} list={listing.hexdigest()[:16]}"
        )

    def read(self, index: int, draw: int) -> dict[str, Any]:
        """See `ClipSource.read`; the window and the flip come from a generator seeded by (key, draw)."""
        entry = self.entries[index]
        try:
            data = entry.source()
        except DataError as error:  # a shard cut short costs its own clips only
            raise ClipError(entry.key, str(error)) from error
        generator = torch.Generator().manual_seed(stable_seed(entry.key, draw))
        mirrored = bool(torch.rand((), generator=generator) < 0.5)  # always drawn: `flip` does not move the windows
        video = read_clip(
            data,
            frames=self.frames,
            size=(self.height, self.width),
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
