"""Frames too large for the memory, in overlapping tiles."""

from collections.abc import Callable
from dataclasses import dataclass

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


def in_tiles(
    x: Tensor, tiling: Tiling | None, run: Callable[[Tensor, Corner], Tensor], *, pixel_in: int, pixel_out: int
) -> Tensor:
    """The results of `run` on the tiles of `B C T H W`, put together; `run` also gets each tile's top left corner.

    `pixel_in` and `pixel_out` are the sizes of a pixel of `x` and of the result, in pixels of the video: 1, or for a
    latent the VAE's space stride. Without a tiling, or if a tile holds whole frames, `run` gets all of x at once.

    Raises UsageError for tiles that do not begin and end where latent pixels do.
    """
    height, width = (side * pixel_in for side in x.shape[3:])
    if tiling is None or count_tiles(tiling, height, width) == 1:
        return run(x, (0, 0))
    tiling.check(max(pixel_in, pixel_out))
    out = None
    for top, down in _tiles(tiling, height, pixel_out):
        for left, across in _tiles(tiling, width, pixel_out):
            rows, columns = (slice(start // pixel_in, (start + tiling.size) // pixel_in) for start in (top, left))
            y = run(x[..., rows, columns], (top, left))
            if out is None:
                out = y.new_zeros(*y.shape[:3], height // pixel_out, width // pixel_out)
            rows, columns = (slice(start // pixel_out, (start + tiling.size) // pixel_out) for start in (top, left))
            out[..., rows, columns].addcmul_(y, (down[:, None] * across).to(y))
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
