"""Latents -> video piece by piece: whatever the device can hold, and on several devices together."""

from collections.abc import Iterator

import torch
from torch import Tensor

from osp.parallel.exchange import Exchange
from osp.parallel.tiles import add_tiles, own_tiles
from osp.vae import LatentCodec, stream_decode
from osp.vae.streaming import PieceProgress


@torch.no_grad()
def decode_in_pieces(
    codec: LatentCodec,
    latent: Tensor,
    frames: int,
    tell: PieceProgress,
    *,
    over: Exchange | None = None,
    leaves: bool = True,
) -> Tensor:
    """Videos as by `codec.decode`, one tile of one video after another; each process of `over` decodes some of them.

    Without a tiling of the VAE each video is a tile. If it `leaves`, a tile is decoded in short pieces that leave the
    device at once, and the result is on the CPU. Before the first piece and after each one `tell` is given how many
    frames of all tiles of this process are done, of how many.

    The pieces may be shorter than those of `codec.decode`, and sums are taken in another order: values differ in the
    last bits. A VAE that cannot stream decodes each tile as a whole.
    """
    vae, done = codec.vae, 0
    total = frames * own_tiles(vae, "decoder", latent, over)

    def run(tile: Tensor) -> Iterator[Tensor]:
        nonlocal done
        for piece in _pieces(codec, tile, frames, leaves):
            yield piece
            done += piece.shape[2]
            tell(done, total)

    if total:
        tell(0, total)
    _, height, width = codec.strides.pixels(*latent.shape[2:])
    device = "cpu" if leaves else latent.device
    video = torch.zeros(len(latent), 3, frames, height, width, device=device)
    add_tiles(vae, "decoder", latent, run, video, over)
    for one in video:  # one by one: it needs a copy
        one.copy_(codec.pixels(one))
    return video


def _pieces(codec: LatentCodec, tile: Tensor, frames: int, short: bool) -> Iterator[Tensor]:
    """The video of a tile, not clamped, in pieces that are as short as they can be, or as a whole."""
    latent, vae = codec.unscaled(tile).to(codec.dtype), codec.vae
    if short and vae.can_stream("decoder"):
        yield from stream_decode(vae, latent.split(1, dim=2), frames=frames)
    else:
        yield vae.decode(latent, frames=frames)
