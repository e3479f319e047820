"""Clips of many sizes and lengths in batches of one shape each: the rule that gives every clip its shape.

`TokenRule` allows any shape between a least and a largest number of tokens, `ShapeList` a few given ones; with one
shape in it that is training at a fixed size. Nothing is decoded: sizes come from the shards' index.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from osp.checks import check_number
from osp.data.media.shape import Shape, Strides
from osp.errors import UsageError


class BucketRule(Protocol):
    """The rule that gives clips their shape; a frozen dataclass, so that its `repr` tells two rules apart."""

    def fit(self, clip: Shape) -> Shape | None:
        """The shape that a clip of this size is read in, None if there is none for it."""
        ...

    def tokens(self, shape: Shape) -> int:
        """Tokens of a clip of this shape."""
        ...


@dataclass(frozen=True)
class Patching:
    """The way from pixels to tokens: the strides of a VAE, and the patches of a transformer.

    Args:
        time_stride, space_stride: the VAE's: 4 and 8 for v1.3, 8 and 8 for v1.5.
        patch_size: latent pixels along a side of a patch; patches are one latent frame deep.
    """

    time_stride: int
    space_stride: int
    patch_size: int = 2

    @property
    def token_strides(self) -> Strides:
        """The strides from pixels to tokens."""
        return Strides(self.time_stride, self.space_stride).patched(self.patch_size)

    def tokens(self, shape: Shape) -> int:
        """Tokens of a clip of this shape; frames that do not fill a time stride count as one that does."""
        return math.prod(self.token_strides.latent(*shape))

    def check(self) -> None:
        """Raise UsageError for strides or patches below 1."""
        for name in ("time_stride", "space_stride", "patch_size"):
            check_number(f"buckets: {name}", getattr(self, name), 1, whole=True)


@dataclass(frozen=True)
class TokenRule(Patching):
    """Any resolution and duration within limits on tokens: the published min/max-token rule.

    Shapes are 1 + a multiple of `time_stride` frames long, or 1 frame, and a multiple of `size_stride` high and wide.
    A clip goes to the one that wastes least of it:

    1. nothing is scaled up: no shape is longer, higher or wider than the clip;
    2. of the shapes within the limits, those with the most frames;
    3. of these the one that keeps most of the picture. What is kept is (pixels of the shape / pixels of the clip) x
       (part of the picture that is in view), so that scaling down and cropping both count. As a shape is filled by
       scaling until it is covered and cropping what juts out, that is min(height / clip's, width / clip's) squared;
    4. of equals the least cropped, then the higher.

    Args:
        min_tokens, max_tokens: of a clip.
        size_stride: 32 for v1.3, 16 for v1.5; a multiple of `space_stride` x `patch_size`.
        min_frames: of a video; shorter ones are left out. None: the fewest that are no image, 1 + `time_stride`.
        max_frames: the longest; None: what `max_tokens` allows. With 1, videos give one frame each.
        frame_tokens: (least, most) tokens of one latent frame. The published recipes limit the area of a frame, which
            is this. It is also what lets images into the same buckets as videos: with it, a shape of one frame need not
            have `min_tokens`.

    Raises:
        UsageError: limits or strides that make no sense.
    """

    min_tokens: int = 1
    max_tokens: int = 1 << 62
    size_stride: int = 32
    min_frames: int | None = None
    max_frames: int | None = None
    frame_tokens: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        self.check()
        side = self.token_strides.space
        if self.size_stride < 1 or self.size_stride % side:
            raise UsageError(
                f"buckets: size_stride={self.size_stride} must be a multiple of {side}, the pixels along a side of a "
                f"token (space_stride x patch_size)"
            )
        if self.frame_tokens is not None:  # a list, where it comes from a file
            low, high = self.frame_tokens
            object.__setattr__(self, "frame_tokens", (int(low), int(high)))
        for name, limits in (
            ("min_tokens, max_tokens", (self.min_tokens, self.max_tokens)),
            ("frame_tokens", self.frame_tokens or (1, 1)),
            ("min_frames, max_frames", (self.min_frames or 1, self.max_frames or self.min_frames or 1)),
        ):
            if not 1 <= limits[0] <= limits[1]:
                raise UsageError(
                    f"buckets: {name} = {limits[0]}, {limits[1]}: the first must be at least 1 and not above the second"
                )

    def fit(self, clip: Shape) -> Shape | None:
        """See `BucketRule.fit`."""
        return _fit(self, clip)

    def lengths(self, frames: int) -> Iterator[int]:
        """The lengths that a clip of so many frames may be cut to, the longest first."""
        only_images = self.max_frames is not None and self.max_frames <= self.time_stride
        if frames == 1 or only_images:
            least, most = 1, 1
        else:
            least = 1 + self.time_stride if self.min_frames is None else self.min_frames
            most = frames if self.max_frames is None else min(frames, self.max_frames)
        longest = self.token_strides.whole_frames(most)
        yield from (length for length in range(longest, 0, -self.time_stride) if length >= least)

    def limits(self, frames: int) -> tuple[int, int]:
        """(least, most) tokens of one latent frame in a shape of so many frames."""
        latent_frames = self.token_strides.latent_frames(frames)
        least, most = -(-self.min_tokens // latent_frames), self.max_tokens // latent_frames
        if self.frame_tokens is not None:
            least = self.frame_tokens[0] if frames == 1 else max(least, self.frame_tokens[0])
            most = min(most, self.frame_tokens[1])
        return least, most


@lru_cache(maxsize=1 << 16)  # many clips share a size
def _fit(rule: TokenRule, clip: Shape) -> Shape | None:
    step = rule.size_stride
    heights = np.arange(step, clip.height + 1, step)[:, None]
    widths = np.arange(step, clip.width + 1, step)[None]
    side = rule.token_strides.space
    tokens = (heights // side) * (widths // side)
    for frames in rule.lengths(clip.frames):
        least, most = rule.limits(frames)
        if not tokens.size or most < tokens[0, 0] or least > tokens[-1, -1]:
            continue  # quickly, as a record may claim any length
        inside = (tokens >= least) & (tokens <= most)
        if inside.any():
            # `_kept` for all of them at once; these are sides scaled by the clip's other side, in whole numbers.
            tall, wide = heights * clip.width, widths * clip.height
            shorter = np.where(inside, np.minimum(tall, wide), 0)
            longer = np.where(shorter == shorter.max(), np.maximum(tall, wide), np.iinfo(np.int64).max)
            row, column = np.argwhere(longer == longer.min())[-1].tolist()
            return Shape(frames, (row + 1) * step, (column + 1) * step)
    return None


def _kept(shape: Shape, clip: Shape) -> tuple[int, int, int, int]:
    """Larger for a shape that wastes less of the clip; in whole numbers, so that equals are equal."""
    scales = shape.height * clip.width, shape.width * clip.height
    return shape.frames, min(scales), -max(scales), shape.height


@dataclass(frozen=True)
class ShapeList(Patching):
    """A few given shapes; each clip goes to the one that wastes least of it, in the sense of `TokenRule`.

    With one shape all clips are read in it, as in training at a fixed size, but smaller ones are left out, not scaled
    up.

    Raises:
        UsageError: no shape, or one that the VAE and the patches do not divide.
    """

    shapes: tuple[Shape, ...] = ()

    def __post_init__(self) -> None:
        self.check()
        object.__setattr__(self, "shapes", tuple(Shape(*shape) for shape in self.shapes))
        if not self.shapes:
            raise UsageError("buckets: the list of shapes is empty")
        for shape in self.shapes:
            if not self.token_strides.fits(*shape):
                raise UsageError(
                    f"buckets: no shape can be {shape} (frames x height x width): frames must be 1 + a multiple of "
                    f"{self.time_stride}, height and width multiples of {self.token_strides.space}"
                )

    def fit(self, clip: Shape) -> Shape | None:
        """See `BucketRule.fit`; a video goes to a shape of one frame only if there are no others."""
        videos = clip.frames > 1 and any(shape.frames > 1 for shape in self.shapes)
        shapes = [shape for shape in self.shapes if shape.frames > 1] if videos else self.shapes
        inside = [s for s in shapes if all(mine <= its for mine, its in zip(s, clip, strict=True))]
        return max(inside, key=lambda shape: _kept(shape, clip), default=None)


@dataclass(frozen=True, eq=False)
class Bucket:
    """The clips of a source that are read in one shape."""

    shape: Shape
    tokens: int
    clips: NDArray[np.int64]  # their indices in the source

    @property
    def is_image(self) -> bool:
        """Whether its clips have one frame."""
        return self.shape.frames == 1


def make_buckets(shapes: Sequence[Shape], rule: BucketRule) -> list[Bucket]:
    """The buckets of clips whose shapes are known."""
    clips: dict[Shape, list[int]] = {}
    for index, shape in enumerate(shapes):
        clips.setdefault(shape, []).append(index)
    return [Bucket(shape, rule.tokens(shape), np.asarray(clips[shape])) for shape in sorted(clips)]


def choose(
    sizes: Sequence[Shape | None], rule: BucketRule, min_clips: int = 1
) -> tuple[list[int], list[Shape], dict[str, int]]:
    """Which clips go to a bucket: their numbers, their shapes, and how many do not (reason -> clips).

    Args:
        sizes: of the clips, None where it is not known.
        min_clips: shapes that fewer clips than these share are left out, with their clips.
    """
    check_number("min_clips", min_clips, 1, whole=True)
    shapes = [None if size is None else rule.fit(size) for size in sizes]
    counts = Counter(shape for shape in shapes if shape is not None)
    kept = [(i, shape) for i, shape in enumerate(shapes) if shape is not None and counts[shape] >= min_clips]
    unknown = sum(size is None for size in sizes)
    dropped = {
        "of unknown size (shards that `osp shards` wrote tell it)": unknown,
        "which no bucket suits (too small, too short, or too large)": sum(shape is None for shape in shapes) - unknown,
        f"in buckets of fewer than {min_clips}": sum(clips for clips in counts.values() if clips < min_clips),
    }
    return [i for i, _ in kept], [shape for _, shape in kept], {why: clips for why, clips in dropped.items() if clips}


def batch_sizes(buckets: Iterable[Bucket], batch_tokens: int) -> list[int]:
    """Clips in a batch of each bucket, so that no batch has more than `batch_tokens` tokens.

    Raises:
        UsageError: a single clip has more.
    """
    sizes = [batch_tokens // bucket.tokens for bucket in buckets]
    if 0 in sizes:
        largest = max(buckets, key=lambda bucket: bucket.tokens)
        raise UsageError(
            f"batch_tokens={batch_tokens}: a clip of {largest.shape} alone has {largest.tokens} tokens; "
            "allow as many, or lower max_tokens"
        )
    return sizes


def bucket_table(
    buckets: Sequence[Bucket], sizes: Sequence[int] | None = None, dropped: Mapping[str, int] | None = None
) -> str:
    """A table for people: one line a bucket, then what was left out.

    Args:
        sizes: clips in a batch of each bucket.
        dropped: reason -> clips.
    """
    total = sum(len(bucket.clips) for bucket in buckets)
    header = ["frames", "height", "width", "tokens", "clips", "share"] + ([] if sizes is None else ["batch"])
    rows = [header]
    for number, bucket in enumerate(buckets):
        clips = len(bucket.clips)
        row = [*map(str, bucket.shape), str(bucket.tokens), str(clips), f"{100 * clips / max(total, 1):.1f} %"]
        rows.append(row + ([] if sizes is None else [str(sizes[number])]))
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.append(f"{total} clips in {len(buckets)} buckets")
    lines += [f"left out: {clips} clips, {reason}" for reason, clips in (dropped or {}).items() if clips]
    return "\n".join(lines)
