"""Clips of any length through a VAE, piece by piece, in memory that does not grow with the clip."""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING

from torch import Tensor

from osp.errors import UsageError
from osp.vae.posterior import GaussianPosterior
from osp.vae.tiling import ClipRun, Tiling

if TYPE_CHECKING:
    from osp.vae.autoencoder import VideoVAE


def stream_encode(
    vae: "VideoVAE", frames: Iterable[Tensor], tiling: Tiling | None = None
) -> Iterator[GaussianPosterior]:
    """Encode a clip that comes in pieces `B 3 t H W` of any lengths, and give the posterior in pieces.

    Together the pieces are what `vae.encode` gives for the whole clip. If the clip's length is not 1 + a multiple of
    the time stride, its last frame is repeated until it is.

    Raises UsageError if the VAE cannot stream, for pieces that do not fit it or each other, and if there is none.
    """
    check_streams(vae)
    run = ClipRun(vae.encode_moments, tiling, streamed=True, pixel_in=1, pixel_out=vae.space_stride)
    seen, final = 0, None
    for piece in frames:
        vae.check_video(piece)
        _check_fits(piece, final)
        seen, final = seen + piece.shape[2], piece[:, :, -1:].clone()
        if (moments := run(piece, last=False)).shape[2]:
            yield GaussianPosterior.from_moments(moments)
    if final is None:
        raise UsageError("there are no frames to encode")
    if missing := -(seen - 1) % vae.time_stride:
        yield GaussianPosterior.from_moments(run(final.expand(-1, -1, missing, -1, -1)))


def stream_decode(vae: "VideoVAE", latents: Iterable[Tensor], tiling: Tiling | None = None) -> Iterator[Tensor]:
    """Decode a latent that comes in pieces `B L t h w` of any lengths, and give the video in pieces `B 3 T H W`.

    Together the pieces are what `vae.decode` gives for the whole latent. Where the VAE looks ahead, frames come out a
    piece later, and the last ones after the last piece.

    Raises UsageError if the VAE cannot stream, for pieces that do not fit it or each other, and if there is none.
    """
    # Nobody knows which piece is the last one until there is no more: then an empty one ends the clip.
    return decode_pieces(vae, chain(((piece, False) for piece in latents), [(None, True)]), tiling)


def decode_pieces(
    vae: "VideoVAE", pieces: Iterable[tuple[Tensor | None, bool]], tiling: Tiling | None
) -> Iterator[Tensor]:
    """`stream_decode` for pieces that are said to be the last one or not; None stands for an empty piece."""
    check_streams(vae)
    run = ClipRun(vae.decode_latent, tiling, streamed=True, pixel_in=vae.space_stride, pixel_out=1)
    final = None
    for piece, last in pieces:
        if piece is not None:
            vae.check_latent(piece)
            _check_fits(piece, final)
            final = piece[:, :, -1:].clone()
        elif final is None:
            raise UsageError("there are no latents to decode")
        else:
            piece = final[:, :, :0]
        if (video := run(piece, last)).shape[2]:
            yield video


def check_streams(vae: "VideoVAE") -> None:
    """Raise UsageError if the VAE cannot stream."""
    if not vae.can_stream:
        raise UsageError(
            f"this {type(vae).__name__} has group norms over time, which need the whole clip, and cannot stream; "
            "leave chunk_frames out, or use a VAE with norm=layer"
        )


def _check_fits(piece: Tensor, before: Tensor | None) -> None:
    if before is not None and (piece.shape[:2] + piece.shape[3:]) != (before.shape[:2] + before.shape[3:]):
        raise UsageError(f"a stream keeps its size; after {tuple(before.shape)} came {tuple(piece.shape)}")
