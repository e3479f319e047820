"""Latents -> video in the CPU's memory, whatever the device can hold."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from osp.vae import LatentCodec, stream_decode
from osp.vae.streaming import PieceProgress


@torch.no_grad()
def decode_in_pieces(codec: LatentCodec, latent: Tensor, frames: int, tell: PieceProgress) -> Tensor:
    """Videos as by `codec.decode`, decoded one by one, in pieces that leave the device: float32, on the CPU.

    Before the first piece and after each one `tell` is given how many frames of all videos are done, of how many.

    The pieces may be shorter than those of `codec.decode`, and sums are then taken in another order: values differ in
    the last bits. A VAE that cannot stream decodes each video as a whole.
    """
    total = len(latent) * frames
    tell(0, total)
    videos: list[Tensor] = []
    for one in latent:

        def tell_of_all(done: int, before: int = len(videos) * frames) -> None:
            tell(before + done, total)

        videos.append(_decode_one(codec, one[None], frames, tell_of_all))
    return torch.stack(videos)


def _decode_one(codec: LatentCodec, latent: Tensor, frames: int, tell: Callable[[int], None]) -> Tensor:
    if not codec.vae.can_stream("decoder"):
        whole = codec.decode(latent, frames)[0].cpu()
        tell(frames)
        return whole
    dtype = codec.dtype
    video, done = torch.empty(0), 0
    for piece in _pieces(codec, latent, dtype):
        piece = codec.pixels(piece[0, :, : frames - done]).cpu()
        if not done:
            video = torch.empty(piece.shape[0], frames, *piece.shape[2:])
        video[:, done : done + piece.shape[1]] = piece
        done += piece.shape[1]
        tell(done)
    return video


def _pieces(codec: LatentCodec, latent: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    yield from stream_decode(codec.vae, (codec.unscaled(part).to(dtype) for part in latent.split(1, dim=2)))
