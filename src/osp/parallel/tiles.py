"""Tiles of clips through a VAE in several processes, each of which takes some of them."""

from collections.abc import Callable, Iterable
from itertools import product

from torch import Tensor

from osp.parallel.exchange import Exchange
from osp.vae import VideoVAE
from osp.vae.streaming import Half
from osp.vae.tiling import tiles

_FRAMES = 16  # of the result that are exchanged at once


def add_tiles(
    vae: VideoVAE, half: Half, x: Tensor, run: Callable[[Tensor], Iterable[Tensor]], out: Tensor, over: Exchange | None
) -> None:
    """Add the results of `run` on the tiles of `B C T H W`, each of one clip, to `out`, `B C T' H' W'` of zeros.

    The VAE's `tiling` says which tiles there are; without one each clip is a tile. `run` gives the result of a tile in
    pieces, one after another in time. Process i of n of `over` takes every n-th tile, and all get the sum: what one
    process would have made, up to rounding. `out` may lie in the CPU's memory while `x` does not.
    """
    pixels = vae.pixels(half)
    height, width = (side * pixels["pixel_in"] for side in x.shape[3:])
    every = product(zip(x.split(1), out.split(1), strict=True), tiles(vae.tiling, height, width, **pixels))
    rank, size = (0, 1) if over is None else (over.rank, over.size)
    for number, ((clip, result), tile) in enumerate(every):
        if number % size != rank:
            continue
        done = 0
        for piece in run(tile.crop(clip)):
            frames = result[:, :, done : done + piece.shape[2]]
            tile.add(frames, piece.to(out))
            done += piece.shape[2]
    if over is not None:
        for part in (part for clip in out.split(1) for part in clip.split(_FRAMES, dim=2)):
            part.copy_(over.summed(part.to(x.device), "tiles"))


def own_tiles(vae: VideoVAE, half: Half, x: Tensor, over: Exchange | None) -> int:
    """How many tiles of `B C T H W` this process takes in `add_tiles`."""
    pixels = vae.pixels(half)
    height, width = (side * pixels["pixel_in"] for side in x.shape[3:])
    count = len(x) * sum(1 for _ in tiles(vae.tiling, height, width, **pixels))
    return count if over is None else len(range(over.rank, count, over.size))
