"""Clips of any length through a VAE, piece by piece, in memory that does not grow with the clip."""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from osp.errors import UsageError
from osp.vae.posterior import GaussianPosterior
from osp.vae.stream import StreamState
from osp.vae.tiling import Corner, Tiling, in_tiles

if TYPE_CHECKING:
    from osp.vae.autoencoder import VideoVAE

Half = Literal["encoder", "decoder"]


def stream_encode(
    vae: "VideoVAE", frames: Iterable[Tensor], tiling: Tiling | None = None
) -> Iterator[GaussianPosterior]:
    """Encode a clip that comes in pieces `B 3 t H W` of any lengths, and give the posterior in pieces.

    Together the pieces are what `vae.encode` gives for the whole clip. If the clip's length is not 1 + a multiple of
    the time stride, its last frame is repeated until it is. With `tiling` each tile is a stream of its own.

    Raises UsageError if the VAE cannot stream, for pieces that do not fit it or each other, and if there is none.
    """
    stream = _Stream(vae, "encoder", tiling)
    seen, final = 0, None
    for piece in frames:
        vae.check_video(piece)
        _check_fits(piece, final)
        seen, final = seen + piece.shape[2], piece[:, :, -1:].clone()
        if (moments := stream(piece, last=False)).shape[2]:
            yield GaussianPosterior.from_moments(moments)
    if final is None:
        raise UsageError("there are no frames to encode")
    if missing := -(seen - 1) % vae.time_stride:
        yield GaussianPosterior.from_moments(stream(final.expand(-1, -1, missing, -1, -1), last=True))


def stream_decode(vae: "VideoVAE", latents: Iterable[Tensor], tiling: Tiling | None = None) -> Iterator[Tensor]:
    """Decode a latent that comes in pieces `B L t h w` of any lengths, and give the video in pieces `B 3 T H W`.

    Together the pieces are what `vae.decode` gives for the whole latent. Where the VAE looks ahead, frames come out a
    piece later, and the last ones after the last piece. With `tiling` each tile is a stream of its own.

    Raises UsageError if the VAE cannot stream, for pieces that do not fit it or each other, and if there is none.
    """
    stream = _Stream(vae, "decoder", tiling)
    final = None
    # Nobody knows which piece is the last one until there is no more: then an empty one ends the clip.
    for piece in chain(latents, [None]):
        if piece is not None:
            vae.check_latent(piece)
            _check_fits(piece, final)
            final = piece[:, :, -1:].clone()
            video = stream(piece, last=False)
        elif final is not None:
            video = stream(final[:, :, :0], last=True)
        else:
            raise UsageError("there are no latents to decode")
        if video.shape[2]:
            yield video


def run_in_pieces(
    half: Callable[[Tensor, StreamState | None], Tensor], x: Tensor, lengths: Iterable[int], frames: int
) -> Tensor:
    """A whole clip `B C T H W` through one half of a VAE, in pieces of the given lengths -> its `frames` frames."""
    state, out, done = StreamState(), None, 0
    pieces = x.split(list(lengths), dim=2)
    for i, piece in enumerate(pieces):
        state.last = i == len(pieces) - 1
        y = half(piece, state)
        state.first = False
        if out is None:
            out = y.new_empty(*y.shape[:2], frames, *y.shape[3:])
        out[:, :, done : done + y.shape[2]] = y
        done += y.shape[2]
    assert out is not None
    assert done == frames
    return out


def check_streams(vae: "VideoVAE", half: Half) -> None:
    """Raise UsageError if that half of the VAE cannot stream."""
    if not vae.can_stream(half):
        raise UsageError(
            f"the {half} of this {type(vae).__name__} has group norms over time, which need the whole clip, so it "
            "cannot stream; leave chunk_frames out, or use a VAE with layer norms"
        )


class _Stream:
    """One clip on its way through one half of a VAE."""

    def __init__(self, vae: "VideoVAE", half: Half, tiling: Tiling | None) -> None:
        check_streams(vae, half)
        self.half = vae.encode_moments if half == "encoder" else vae.decode_latent
        self.pixels = vae.pixels(half)
        self.tiling = tiling or vae.tiling
        self._states: dict[Corner, StreamState] = {}

    def __call__(self, x: Tensor, *, last: bool) -> Tensor:
        """The next piece -> what of the result is ready."""

        def advance(tile: Tensor, corner: Corner) -> Tensor:
            state = self._states.setdefault(corner, StreamState())
            state.last = last
            y = self.half(tile, state)
            state.first = False
            return y

        return in_tiles(x, self.tiling, advance, **self.pixels)


def _check_fits(piece: Tensor, before: Tensor | None) -> None:
    if before is not None and (piece.shape[:2] + piece.shape[3:]) != (before.shape[:2] + before.shape[3:]):
        raise UsageError(f"a stream keeps its size; after {tuple(before.shape)} came {tuple(piece.shape)}")
