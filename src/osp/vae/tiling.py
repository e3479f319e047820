"""Frames too large for the memory, in overlapping tiles."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from osp.checks import check_number
from osp.errors import UsageError

Corner = tuple[int, int]


@dataclass(frozen=True)
class Tiling:
    """Square tiles of `size` pixels a side, of which neighbours share at least `overlap` pixels.

    A tile sees nothing beyond its edge, so the result is not exact; where tiles overlap, one fades into the other.
    Raises UsageError for an overlap that leaves nothing of a tile.
    """

    size: int
    overlap: int = 64

    def __post_init__(self) -> None:
        check_number("tiling: size", self.size, 1, whole=True)
        check_number("tiling: overlap", self.overlap, 0, self.size - 1, whole=True)

    @classmethod
    def read(cls, value: Any) -> Self | None:
        """The tiling of a setting `tiling`: null, or a mapping. Raises UsageError for anything else."""
        if value is None:
            return None
        if not isinstance(value, dict) or "size" not in value or not set(value) <= {"size", "overlap"}:
            raise UsageError(f"tiling={value}: must be null or like {{size: 256, overlap: 64}}")
        return cls(**value)

    def check(self, space_stride: int) -> None:
        """Raise UsageError unless tiles begin and end where latent pixels do."""
        for name in ("size", "overlap"):
            if getattr(self, name) % space_stride:
                raise UsageError(f"tiling: {name}={getattr(self, name)}: must be a multiple of {space_stride}")

    def starts(self, length: int) -> list[int]:
        """Where the tiles of a side of `length` pixels begin; the last one ends with the side."""
        if length <= self.size:
            return [0]
        return [*range(0, length - self.size, self.size - self.overlap), length - self.size]


def count_tiles(tiling: Tiling | None, height: int, width: int) -> int:
    """How many tiles frames of so many pixels go through in; 1 if they stay whole."""
    return 1 if tiling is None else len(tiling.starts(height)) * len(tiling.starts(width))


@dataclass(frozen=True)
class Tile:
    """A tile of frames: its top left `corner`, where it lies in the input and in the result, and what it counts there.

    `corner` is in pixels of the video; `weight` is `H W` of the tile in the result, None for whole frames.
    """

    corner: Corner
    taken: tuple[slice, slice]
    given: tuple[slice, slice]
    weight: Tensor | None

    def crop(self, x: Tensor) -> Tensor:
        """The tile's part of an input `... H W`."""
        return x[(..., *self.taken)]

    def add(self, result: Tensor, y: Tensor) -> None:
        """Add the result of the tile, `... h w`, to that of all, `... H W`."""
        place = result[(..., *self.given)]
        if self.weight is None:
            place.add_(y)
        else:
            place.addcmul_(y, self.weight.to(y))


def tiles(tiling: Tiling | None, height: int, width: int, *, pixel_in: int, pixel_out: int) -> Iterator[Tile]:
    """The tiles of frames of so many pixels of the video, row by row; `pixel_in` and `pixel_out` are as in `in_tiles`.

    Raises UsageError for tiles that do not begin and end where latent pixels do.
    """
    if tiling is None or count_tiles(tiling, height, width) == 1:
        yield Tile((0, 0), (slice(None), slice(None)), (slice(None), slice(None)), None)
        return
    tiling.check(max(pixel_in, pixel_out))

    def place(start: int, length: int, pixel: int) -> slice:
        return slice(start // pixel, (start + min(tiling.size, length)) // pixel)

    for top, down in _tiles(tiling, height, pixel_out):
        for left, across in _tiles(tiling, width, pixel_out):
            taken, given = ((place(top, height, pixel), place(left, width, pixel)) for pixel in (pixel_in, pixel_out))
            yield Tile((top, left), taken, given, down[:, None] * across)


def in_tiles(
    x: Tensor, tiling: Tiling | None, run: Callable[[Tensor, Corner], Tensor], *, pixel_in: int, pixel_out: int
) -> Tensor:
    """The results of `run` on the tiles of `B C T H W`, put together; `run` also gets each tile's top left corner.

    `pixel_in` and `pixel_out` are the sizes of a pixel of `x` and of the result, in pixels of the video: 1, or for a
    latent the VAE's space stride. Without a tiling, or if a tile holds whole frames, `run` gets all of x at once.

    Raises UsageError for tiles that do not begin and end where latent pixels do.
    """
    height, width = (side * pixel_in for side in x.shape[3:])
    out = None
    for tile in tiles(tiling, height, width, pixel_in=pixel_in, pixel_out=pixel_out):
        y = run(tile.crop(x), tile.corner)
        if tile.weight is None:
            return y
        if out is None:
            out = y.new_zeros(*y.shape[:3], height // pixel_out, width // pixel_out)
        tile.add(out, y)
    assert out is not None
    return out


def _tiles(tiling: Tiling, length: int, pixel: int) -> list[tuple[int, Tensor]]:
    """Where the tiles of a side begin, in video pixels, and what each contributes to each pixel of the result.

    A tile counts less and less towards an edge that it shares; all tiles together count 1 everywhere.
    """
    starts = tiling.starts(length)
    size, overlap = min(tiling.size, length) // pixel, max(1, tiling.overlap // pixel)
    ramp = ((torch.arange(size) + 0.5) / overlap).clamp(max=1.0)
    weights = torch.zeros(len(starts), length // pixel)
    for weight, start in zip(weights, starts, strict=True):
        inside = torch.ones(size)
        if start != starts[0]:
            inside = inside * ramp
        if start != starts[-1]:
            inside = inside * ramp.flip(0)
        weight[start // pixel : start // pixel + size] = inside
    weights /= weights.sum(dim=0)
    return [
        (start, weight[start // pixel : start // pixel + size]) for start, weight in zip(starts, weights, strict=True)
    ]
