"""A VAE's encoder at work on batches of clips, in one process or in those of a group together."""

from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from osp.data.media.video import to_float
from osp.devices import autocast_dtype
from osp.parallel.exchange import Exchange
from osp.parallel.tiles import add_tiles
from osp.vae import VideoVAE
from osp.vae.posterior import GaussianPosterior


class ClipEncoder:
    """uint8 clips `B 3 T H W` -> the VAE's posterior, in the precision that is given.

    With `over` its processes share the tiles of the clips, where the VAE has a `tiling`, else the clips of a batch. The
    first process calls this, and `finish` at the end; the others are in `assist` meanwhile. Nothing but clips and
    posteriors goes between them, so that one process alone reads and writes. Raises UsageError for a precision that is
    not known.
    """

    def __init__(self, vae: VideoVAE, device: torch.device, precision: str, over: Exchange | None = None) -> None:
        self.vae, self.device, self.over = vae.to(device), device, over
        self._dtype = autocast_dtype(precision)

    @torch.no_grad()
    def __call__(self, clips: Tensor) -> GaussianPosterior:
        """The posterior of a batch; its parts are on the device."""
        clips = clips.to(self.device)
        if self.over is not None:
            self._send_shape(clips.shape)
        return self._posterior(clips)

    @torch.no_grad()
    def assist(self) -> None:
        """Encode a share of each batch that the first process has, until it is done."""
        while any(shape := self._receive_shape()):
            self._posterior(torch.empty(shape, dtype=torch.uint8, device=self.device))

    def finish(self) -> None:
        """Tell the other processes that there is no more."""
        if self.over is not None:
            self._send_shape(torch.Size([0] * 5))

    def autocast(self) -> AbstractContextManager[object]:
        """In it, arithmetic has the precision."""
        return torch.autocast(self.device.type, dtype=self._dtype, enabled=self._dtype is not None)

    def _posterior(self, clips: Tensor) -> GaussianPosterior:
        if self.over is None:
            with self.autocast():
                return self.vae.encode(to_float(clips))
        clips = self.over.from_first(clips.contiguous(), "clips")
        frames, video = clips.shape[2], self.vae.pad_frames(to_float(clips))
        channels, size = 2 * self.vae.latent_channels, self.vae.strides.latent(*video.shape[2:])
        moments = torch.zeros(len(video), channels, *size, device=self.device)
        add_tiles(self.vae, "encoder", video, self._moments, moments, self.over)
        return GaussianPosterior.from_moments(moments, frames)

    def _moments(self, tile: Tensor) -> Iterator[Tensor]:
        with self.autocast():  # over when the result is taken
            moments = self.vae.moments(tile)
        yield moments

    def _send_shape(self, shape: torch.Size) -> None:
        assert self.over is not None
        self.over.from_first(torch.tensor(shape, device=self.device), "clips")

    def _receive_shape(self) -> list[int]:
        assert self.over is not None
        return self.over.from_first(torch.zeros(5, dtype=torch.long, device=self.device), "clips").tolist()
