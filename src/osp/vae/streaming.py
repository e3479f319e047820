"""Clips of any length through a VAE, piece by piece, in memory that does not grow with the clip."""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from osp.checks import check_number
from osp.errors import UsageError
from osp.vae.posterior import GaussianPosterior
from osp.vae.stream import StreamState
from osp.vae.tiling import Corner, Tiling, in_tiles

if TYPE_CHECKING:
    from osp.vae.autoencoder import VideoVAE

Half = Literal["encoder", "decoder"]
Network = Callable[[Tensor, StreamState | None], Tensor]
PieceProgress = Callable[[int, int], None]
"""Told how many frames of the result are done, and how many there will be."""


def stream_encode(
    vae: "VideoVAE", frames: Iterable[Tensor], tiling: Tiling | None = None
) -> Iterator[GaussianPosterior]:
    """Encode a clip that comes in pieces `B 3 t H W` of any lengths, and give the posterior in pieces.

    The pieces that come out need not match those that went in. Together they are what `vae.encode` gives for the whole
    clip. If its length is not 1 + a multiple of the time stride, its last frame is repeated until it is. With `tiling`
    each tile is a stream of its own.

    Raises UsageError if the VAE cannot stream, for pieces that do not fit it or each other, and if there is none.
    """
    stream = _Stream(vae, "encoder", tiling)
    seen, final = 0, None
    for piece in frames:
        vae.check_video(piece)
        _check_fits(piece, final)
        seen, final = seen + piece.shape[2], piece[:, :, -1:].clone()
        yield from map(GaussianPosterior.from_moments, stream(piece, last=False))
    if final is None:
        raise UsageError("there are no frames to encode")
    if missing := vae.strides.missing_frames(seen):
        filling = final.expand(-1, -1, missing, -1, -1)
        yield from map(GaussianPosterior.from_moments, stream(filling, last=True))


def stream_decode(
    vae: "VideoVAE", latents: Iterable[Tensor], tiling: Tiling | None = None, frames: int | None = None
) -> Iterator[Tensor]:
    """Decode a latent that comes in pieces `B L t h w` of any lengths, and give the video in pieces `B 3 T H W`.

    The pieces that come out need not match those that went in, as the VAE looks ahead. Together they are what
    `vae.decode` gives for the whole latent: 1 + a multiple of the time stride, or only the first `frames` frames, the
    length of a clip that was filled up when it was encoded. With `tiling` each tile is a stream of its own.

    Raises UsageError if the VAE cannot stream, for pieces that do not fit it or each other, if there is none, and, at
    the end, for a latent that holds fewer than `frames`.
    """
    check_number("frames", frames, 1, whole=True, null="all that the latent holds")
    left = frames
    for piece in _decoded(vae, latents, tiling):
        if left is not None:
            piece = piece[:, :, :left]
            left -= piece.shape[2]
        if piece.shape[2]:
            yield piece
        del piece  # not to be held while the next one is computed
    if left:
        raise UsageError(f"frames={frames}: the latent holds {frames - left if frames else 0}; ask for no more")


def _decoded(vae: "VideoVAE", latents: Iterable[Tensor], tiling: Tiling | None) -> Iterator[Tensor]:
    """The whole video in pieces."""
    stream = _Stream(vae, "decoder", tiling)
    final = None
    # Nobody knows which piece is the last one until there is no more: then an empty one ends the clip.
    for piece in chain(latents, [None]):
        if piece is not None:
            vae.check_latent(piece)
            _check_fits(piece, final)
            final = piece[:, :, -1:].clone()
            yield from stream(piece, last=False)
        elif final is not None:
            yield from stream(final[:, :, :0], last=True)
        else:
            raise UsageError("there are no latents to decode")


def run_clip(
    network: Network, x: Tensor, lengths: Iterable[int], frames: int, piece: int, tell: Callable[[int], None]
) -> Tensor:
    """A whole clip `B C T H W` through one half of a VAE, in chunks of the given lengths -> its `frames` frames.

    After each piece `tell` is given the number of frames that it added.
    """
    state, out, done = StreamState(), None, 0
    chunks = x.split(list(lengths), dim=2)
    for i, chunk in enumerate(chunks):
        for part, last in _pieces(chunk, piece, first=i == 0, last=i == len(chunks) - 1):
            y = _advance(network, part, state, last)
            if out is None:
                out = y.new_empty(*y.shape[:2], frames, *y.shape[3:])
            out[:, :, done : done + y.shape[2]] = y
            done += y.shape[2]
            tell(y.shape[2])
    assert out is not None
    assert done == frames
    return out


def _pieces(chunk: Tensor, length: int, *, first: bool, last: bool) -> Iterator[tuple[Tensor, bool]]:
    """A chunk in pieces of `length` frames, so that a large one needs no more memory, and whether each ends the clip.

    The first piece of a clip is a frame longer, so that after it strides are full and frames come in pairs (see
    `osp.vae.convolution`). A chunk without frames is one piece.
    """
    done = 0
    while done == 0 or done < chunk.shape[2]:
        end = done + length + (first and done == 0)
        yield chunk[:, :, done:end], last and end >= chunk.shape[2]
        done = end


def _advance(network: Network, x: Tensor, state: StreamState, last: bool) -> Tensor:
    state.last = last
    y = network(x, state)
    state.first = False
    return y


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
        self.vae, self.half = vae, half
        self.tiling = tiling or vae.tiling
        self.states: dict[Corner, StreamState] = {}

    def __call__(self, chunk: Tensor, *, last: bool) -> Iterator[Tensor]:
        """The next chunk -> what of the result is ready, as it comes."""
        network, length = self.vae.network(self.half), self.vae.piece(self.half)
        for part, ends in _pieces(chunk, length, first=not self.states, last=last):

            def advance(tile: Tensor, corner: Corner, ends: bool = ends) -> Tensor:
                return _advance(network, tile, self.states.setdefault(corner, StreamState()), ends)

            y = in_tiles(part, self.tiling, advance, **self.vae.pixels(self.half))
            if y.shape[2]:
                yield y
            del y  # not to be held while the next piece is computed


def _check_fits(piece: Tensor, before: Tensor | None) -> None:
    if before is not None and (piece.shape[:2] + piece.shape[3:]) != (before.shape[:2] + before.shape[3:]):
        raise UsageError(f"a stream keeps its size; after {tuple(before.shape)} came {tuple(piece.shape)}")
