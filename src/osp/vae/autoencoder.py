"""The base of all VAEs: encode and decode, whole, in pieces and in tiles, for any number of frames."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from osp.checks import check_number
from osp.data.media.shape import Strides
from osp.errors import UsageError
from osp.vae.posterior import GaussianPosterior
from osp.vae.stream import StreamState
from osp.vae.streaming import Half, Network, PieceProgress, check_streams, run_clip
from osp.vae.tiling import Corner, Tiling, count_tiles, in_tiles

COLOURS = 3

# Latent frames that go through at once in a stream: few enough for the caches. An even number, see `osp.vae.streaming`.
_PIECE = 2
_LARGE = 256 * 256  # pixels of a frame


@dataclass(frozen=True)
class Autoencoding:
    """One pass through a VAE, with what the losses need.

    `reconstruction` is `B C T H W`. Of a VAE with wavelets, `encoder_coefficients` and `decoder_coefficients` hold the
    inner levels of the pyramid as the encoder took them from the video and as the decoder rebuilt them.
    """

    reconstruction: Tensor
    posterior: GaussianPosterior
    encoder_coefficients: tuple[Tensor, ...] = ()
    decoder_coefficients: tuple[Tensor, ...] = ()


class VideoVAE(nn.Module):
    """A causal video VAE: the first frame becomes one latent frame, every further `time_stride` frames another one.

    A clip may have any number of frames. One that is not 1 + a multiple of `time_stride` long is encoded as if its last
    frame stood still until it is; the posterior remembers the true number, and `decode(latent, frames=...)` cuts off
    what was added. Height and width are multiples of `space_stride`.

    A subclass has the attributes below, the modules `encoder` and `decoder`, and calls them in `encode_moments` and
    `decode_latent`. To be trained against a discriminator it has a `last_layer`, too.
    """

    latent_channels: int
    time_stride: int
    space_stride: int
    has_wavelets = False
    """Whether a pass gives wavelet coefficients of encoder and decoder, which a loss may compare."""
    tiling: Tiling | None = None
    """The tiles that frames go through in where a call does not say; None: whole frames."""
    origin: str | None = None
    """The file or folder that the weights were read from, if they were."""
    scaling: tuple[float | list[float], float | list[float]] | None = None
    """Shift and scale that make its latents fit for a denoiser, of published weights that come with them."""
    published_kind: str | None = None
    """The published kind that it was read as (`osp.weights.load_published`), if it was."""

    @property
    def strides(self) -> Strides:
        """Between the sizes of a clip and of its latent."""
        return Strides(self.time_stride, self.space_stride)

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The keyword arguments that build this VAE again."""

    @property
    def last_layer(self) -> nn.Module:
        """The last layer that learns, where the adversarial loss is balanced. Raises UsageError if there is none."""
        raise UsageError(
            f"a {type(self).__name__} names no last layer, so that no discriminator can be balanced with it"
        )

    @abstractmethod
    def encode_moments(self, video: Tensor, state: StreamState | None = None) -> Tensor:
        """`B 3 T H W` with T = 1 mod `time_stride` (any T in a stream) -> mean and log variance, `B 2L T' H' W'`."""

    @abstractmethod
    def decode_latent(self, latent: Tensor, state: StreamState | None = None) -> Tensor:
        """`B L T' H' W'` -> `B 3 1+(T'-1)*time_stride H W`; in a stream, the frames that are ready."""

    def forward(
        self, video: Tensor, generator: torch.Generator | None = None, share: tuple[int, int] = (0, 1)
    ) -> Autoencoding:
        """`B 3 T H W` to a latent (`GaussianPosterior.sample`) and back, with what the losses need."""
        posterior = GaussianPosterior.from_moments(self.encode_moments(self.pad_frames(video)), video.shape[2])
        reconstruction = self.decode_latent(posterior.sample(generator, share))
        return Autoencoding(reconstruction[:, :, : video.shape[2]], posterior)

    def can_stream(self, half: Half) -> bool:
        """Whether every layer of that half can work on a piece of a clip, which a norm over all frames cannot."""
        return all(getattr(module, "per_frame", True) for module in self.get_submodule(half).modules())

    def check_size(self, frames: int, height: int, width: int) -> None:
        """Raise UsageError unless a clip of this size can be encoded."""
        check_number("frames", frames, 1, whole=True)
        self.strides.check_sides(height, width)

    def check_video(self, video: Tensor) -> None:
        """Raise UsageError unless this is a video `B 3 T H W` of a size that can be encoded."""
        if video.ndim != 5 or video.shape[1] != COLOURS:
            raise UsageError(f"a video is B 3 T H W, not {tuple(video.shape)}")
        self.check_size(*video.shape[2:])

    def check_latent(self, latent: Tensor) -> None:
        """Raise UsageError unless this is a latent `B L T H W` of this VAE's channels."""
        if latent.ndim != 5 or latent.shape[1] != self.latent_channels or latent.shape[2] < 1:
            raise UsageError(f"a latent of this VAE is B {self.latent_channels} T H W, not {tuple(latent.shape)}")

    def pad_frames(self, video: Tensor) -> Tensor:
        """`B 3 T H W` -> the same with the last frame repeated until T is 1 + a multiple of the time stride."""
        missing = self.strides.missing_frames(video.shape[2])
        return torch.cat([video, video[:, :, -1:].expand(-1, -1, missing, -1, -1)], dim=2) if missing else video

    def encode(self, video: Tensor, chunk_frames: int | None = None, tiling: Tiling | None = None) -> GaussianPosterior:
        """`B 3 T H W` in [-1, 1] with any T >= 1 -> posterior over `B L 1+ceil((T-1)/time_stride) H/s W/s`.

        The clip goes through in chunks of `chunk_frames` frames, with the same result for any. None leaves the choice
        to the VAE, which takes the clip as a stream unless gradients are recorded or a layer needs all frames. With
        `tiling`, or if the VAE has one, the frames go through in tiles, which is not exact.

        Raises UsageError for a size that does not fit, and for `chunk_frames` where the VAE cannot stream.
        """
        self.check_video(video)
        return GaussianPosterior.from_moments(self.moments(video, chunk_frames, tiling), video.shape[2])

    def moments(self, video: Tensor, chunk_frames: int | None = None, tiling: Tiling | None = None) -> Tensor:
        """Means and log variances, which are not clamped, `B 2L T H W`: `encode` makes its posterior of them."""
        length = self.strides.latent_frames(video.shape[2])
        return self._run("encoder", self.pad_frames(video), chunk_frames, tiling, length)

    def decode(
        self,
        latent: Tensor,
        chunk_frames: int | None = None,
        tiling: Tiling | None = None,
        frames: int | None = None,
        progress: PieceProgress | None = None,
    ) -> Tensor:
        """`B L T H W` -> video `B 3 1+(T-1)*time_stride sH sW`, or only its first `frames` frames.

        The latent goes through in chunks of `chunk_frames` latent frames; None and `tiling` mean what they mean in
        `encode`. `progress` is told after each piece how many frames are done, of how many; tiles count one by one.
        An exception that it raises ends the work.

        Raises UsageError for a latent of another model, for more frames than it holds, and for `chunk_frames` where the
        VAE cannot stream.
        """
        self.check_latent(latent)
        held = self.strides.pixel_frames(latent.shape[2])
        least = max(1, held - self.time_stride + 1)
        if frames is not None and not least <= frames <= held:
            raise UsageError(f"frames={frames} do not go with {latent.shape[2]} latent frames; use {least} to {held}")
        return self._run("decoder", latent, chunk_frames, tiling, held, progress)[:, :, :frames]

    def network(self, half: Half) -> Network:
        """`encode_moments` or `decode_latent`: a clip or a piece of one, and the state of its stream -> the result."""
        return self.encode_moments if half == "encoder" else self.decode_latent

    def piece(self, half: Half) -> int:
        """The frames of that half's input that go through at once in a stream."""
        return _PIECE * (self.time_stride if half == "encoder" else 1)

    def pixels(self, half: Half) -> dict[str, int]:
        """The sizes of a pixel of that half's input and output, in pixels of the video."""
        pixel_in, pixel_out = (1, self.space_stride) if half == "encoder" else (self.space_stride, 1)
        return {"pixel_in": pixel_in, "pixel_out": pixel_out}

    def _run(
        self,
        half: Half,
        x: Tensor,
        chunk_frames: int | None,
        tiling: Tiling | None,
        frames: int,
        progress: PieceProgress | None = None,
    ) -> Tensor:
        """One half over a whole clip, one tile after the other; `frames` is the length of the result."""
        if chunk_frames is not None:
            check_number("chunk_frames", chunk_frames, 1, whole=True)
            check_streams(self, half)
        streams = chunk_frames is not None or (not torch.is_grad_enabled() and self.can_stream(half))
        network, length = self.network(half), x.shape[2]
        size = chunk_frames or length
        lengths = [*[size] * (length // size), *([length % size] if length % size else [])]
        pixels, tiling = self.pixels(half), tiling or self.tiling
        total = frames * count_tiles(tiling, *(side * pixels["pixel_in"] for side in x.shape[3:]))
        done = 0

        def tell(more: int) -> None:
            nonlocal done
            done += more
            if progress is not None:
                progress(done, total)

        def run(tile: Tensor, _: Corner) -> Tensor:
            if not streams:
                whole = network(tile, None)
                tell(frames)
                return whole
            # A piece holds more of small frames, up to the area of a piece of large ones, since each call has its cost.
            area = tile.shape[3] * tile.shape[4] * pixels["pixel_in"] ** 2
            piece = self.piece(half) * (max(1, _LARGE // area) if chunk_frames is None else 1)
            return run_clip(network, tile, lengths, frames, piece, tell)

        return in_tiles(x, tiling, run, **pixels)
