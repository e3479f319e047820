"""Clips in sizes of their own: each video's height and width, and all of its frames, where a size is not given."""

from pathlib import Path
from typing import Any

from osp.checks import check_number
from osp.data.media.limits import DEFAULT_LIMITS, Limits
from osp.data.media.shape import Shape, Strides
from osp.data.media.video import ClipError, VideoInfo, probe
from osp.data.media.whole import stream_video
from osp.data.shards.index import read_listing
from osp.data.sources.shards import Decoding
from osp.data.sources.source import ListedClips
from osp.data.sources.where import passing
from osp.errors import DataError


class OwnSizeClips(ListedClips):
    """The clips of a folder, or one file, each in a size that a VAE takes.

    Args:
        path: as for `ShardClips`.
        strides: those of the VAE, to whose multiples sides are rounded down.
        frames: frames of each clip, from its beginning; None: all that it has, in pieces.
        height, width: pixels, as in `ShardClips`; None: the video's own, or what the other one leaves at its aspect.
        stride, fps, limits, where: as for `ShardClips`.

    A clip with all its frames has `pieces`, an iterator of uint8 `C T H W`, in the place of `video`, and `height`,
    `width` and `expected`, the frames that its file announces. A clip with fewer frames than `frames`, or of fewer
    pixels than the strides, is a ClipError of `read`.

    Raises:
        DataError: the folder or file is not readable, or no clip meets the condition.
        UsageError: a size, `stride`, `fps` or `where` makes no sense.
    """

    def __init__(
        self,
        path: str | Path,
        strides: Strides,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        stride: int = 1,
        fps: float | None = None,
        limits: Limits = DEFAULT_LIMITS,
        where: str | None = None,
    ) -> None:
        for name, value in (("frames", frames), ("height", height), ("width", width)):
            check_number(name, value, 1, whole=True, null="the video's own")
        self.path, self.strides = Path(path), strides
        self.frames, self.height, self.width = frames, height, width
        self.limits = limits
        self.decoding = Decoding(stride, fps, random_start=False, flip=False, limits=limits)
        listing = read_listing(path, limits)
        self.passed_over = listing.left_out
        self.entries, self.dropped = passing(listing.entries, where, str(path))

    def fingerprint(self) -> str:
        return f"own sizes {self.frames} {self.height} {self.width} {self.decoding} clips={len(self)}"

    def read(self, index: int, draw: int) -> dict[str, Any]:
        """Clip `index`, as `ClipSource.read` or with `pieces`; `draw` changes nothing."""
        entry = self.entries[index]
        try:
            data = entry.source()
        except DataError as error:
            raise ClipError(entry.key, str(error)) from error
        info = entry.part.info(probe(data, entry.key, limits=self.limits), entry.key)
        height, width = self._sides(entry.key, info)
        if self.frames is not None:
            return self.decoding.read(entry, Shape(self.frames, height, width), draw)
        stride, fps = self.decoding.stride, self.decoding.fps
        pieces = stream_video(
            data, entry.key, size=(height, width), stride=stride, fps=fps, limits=self.limits, part=entry.part
        )
        return {
            "pieces": pieces,
            "height": height,
            "width": width,
            "expected": max(1, round(info.duration * fps) if fps else -(-info.frames // stride)),
            "key": entry.key,
            "caption": str(entry.record.get("caption", "")),
            "fps": fps or info.fps / stride,
        }

    def _sides(self, key: str, info: VideoInfo) -> tuple[int, int]:
        height, width = self.height, self.width
        if height is None:
            height = info.height if width is None else round(info.height * width / info.width)
            height = height // self.strides.space * self.strides.space
        if width is None:
            width = info.width if self.height is None else round(info.width * self.height / info.height)
            width = width // self.strides.space * self.strides.space
        if height < 1 or width < 1:
            side = self.strides.space
            raise ClipError(key, f"{info.height}x{info.width} pixels are fewer than the VAE takes, {side}x{side}")
        return height, width
