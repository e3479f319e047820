"""Frames too large for the memory, in overlapping tiles."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from osp.errors import UsageError
from osp.vae.stream import StreamState

Half = Callable[[Tensor, StreamState | None], Tensor]
"""One half of a VAE: `encode_moments` or `decode_latent`."""


@dataclass(frozen=True)
class Tiling:
    """Square tiles of `size` pixels a side, of which neighbours share at least `overlap` pixels.

    A tile sees nothing beyond its edge, so the result is not exact; where tiles overlap, one fades into the other.
    Raises UsageError for an overlap that leaves nothing of a tile.
    """

    size: int
    overlap: int = 64

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.size:
            raise UsageError(f"tiles of {self.size} pixels cannot overlap by {self.overlap}; use 0 to {self.size - 1}")

    def check(self, space_stride: int) -> None:
        """Raise UsageError unless tiles begin and end where latent pixels do."""
        for name in ("size", "overlap"):
            if getattr(self, name) % space_stride:
                raise UsageError(f"tiling: {name}={getattr(self, name)} must be a multiple of {space_stride}")

    def starts(self, length: int) -> list[int]:
        """Where the tiles of a side of `length` pixels begin; the last one ends with the side."""
        if length <= self.size:
            return [0]
        return [*range(0, length - self.size, self.size - self.overlap), length - self.size]


class ClipRun:
    """One clip on its way through one half of a VAE: whole or in pieces, in tiles or not.

    `streamed` says that the clip comes in pieces; each tile is then a stream of its own. `pixel_in` and `pixel_out` are
    the sizes of a pixel of the half's input and output, in pixels of the video.
    """

    def __init__(self, half: Half, tiling: Tiling | None, *, streamed: bool, pixel_in: int, pixel_out: int) -> None:
        self.half = half
        self.tiling = tiling
        self.streamed = streamed
        self.pixel_in, self.pixel_out = pixel_in, pixel_out
        if tiling is not None:
            tiling.check(max(pixel_in, pixel_out))
        self._states: dict[tuple[int, int], StreamState] = {}

    def __call__(self, x: Tensor, last: bool = True) -> Tensor:
        """The next piece of the clip, `B C T H W` -> what of the result is ready."""
        height, width = (side * self.pixel_in for side in x.shape[3:])
        if self.tiling is None or self.tiling.size >= max(height, width):
            return self._advance(x, (0, 0), last)
        out = None
        for top, down in self._tiles(height):
            for left, across in self._tiles(width):
                tile = x[..., self._in(top), self._in(left)]
                y = self._advance(tile, (top, left), last)
                if out is None:
                    out = y.new_zeros(*y.shape[:3], height // self.pixel_out, width // self.pixel_out)
                out[..., self._out(top, y.shape[3]), self._out(left, y.shape[4])] += y * (
                    down.to(y)[:, None] * across.to(y)
                )
        assert out is not None
        return out

    def _advance(self, x: Tensor, tile: tuple[int, int], last: bool) -> Tensor:
        state = self._states.setdefault(tile, StreamState()) if self.streamed else None
        if state is None:
            return self.half(x, None)
        state.last = last
        y = self.half(x, state)
        state.first = False
        return y

    def _in(self, start: int) -> slice:
        assert self.tiling is not None
        return slice(start // self.pixel_in, (start + self.tiling.size) // self.pixel_in)

    def _out(self, start: int, length: int) -> slice:
        return slice(start // self.pixel_out, start // self.pixel_out + length)

    def _tiles(self, length: int) -> list[tuple[int, Tensor]]:
        """Where tiles begin along a side, in video pixels, and what each contributes to each of its output pixels.

        A tile counts less and less towards an edge that it shares; all tiles together count 1 everywhere.
        """
        assert self.tiling is not None
        starts = self.tiling.starts(length)
        size, overlap = min(self.tiling.size, length) // self.pixel_out, max(1, self.tiling.overlap // self.pixel_out)
        ramp = ((torch.arange(size) + 0.5) / overlap).clamp(max=1.0)
        total = torch.zeros(length // self.pixel_out)
        weights = []
        for start in starts:
            weight = torch.ones(size)
            if start > 0:
                weight = weight * ramp
            if start != starts[-1]:
                weight = weight * ramp.flip(0)
            total[self._out(start, size)] += weight
            weights.append(weight)
        return [(start, w / total[self._out(start, size)]) for start, w in zip(starts, weights, strict=True)]
