"""The simplest VAE of the family: keep the lowest Haar band, drop the others. What a trained VAE has to beat."""

from typing import Any

import torch
from torch import Tensor

from osp.checks import check_choice
from osp.vae.autoencoder import VideoVAE
from osp.vae.stream import Chain, StreamState
from osp.vae.wavelet import HaarTransform, InverseHaarTransform, haar_filters_2d, haar_filters_3d


class LowestBand(VideoVAE):
    """Three Haar levels at the WF-VAE's down-sampling, of which the three channels of the lowest band are the latent.

    `time_stride` is 4 (level 1 in space only) or 8. Raises UsageError for another.
    """

    latent_channels = 3
    space_stride = 8

    def __init__(self, time_stride: int) -> None:
        super().__init__()
        check_choice("time_stride", time_stride, (4, 8))
        self.time_stride = time_stride
        three, two = haar_filters_3d(), haar_filters_2d()
        levels = (three, two if time_stride == 4 else three, three)
        self.encoder = Chain(*(HaarTransform(filters) for filters in levels))
        self.decoder = Chain(*(InverseHaarTransform(filters) for filters in reversed(levels)))
        self._dropped_bands = [len(filters) - 1 for filters in reversed(levels)]

    @property
    def settings(self) -> dict[str, Any]:
        """The keyword arguments that build this VAE again."""
        return {"time_stride": self.time_stride}

    def encode_moments(self, video: Tensor, state: StreamState | None = None) -> Tensor:
        """See `VideoVAE`; the posterior has no variance."""
        for level in self.encoder:
            video = level(video, state)[:, :3]
        return torch.cat([video, torch.full_like(video, -30.0)], dim=1)

    def decode_latent(self, latent: Tensor, state: StreamState | None = None) -> Tensor:
        """See `VideoVAE`; every band but the lowest is zero."""
        for level, dropped in zip(self.decoder, self._dropped_bands, strict=True):
            nothing = torch.zeros_like(latent).repeat(1, dropped, 1, 1, 1)
            latent = level(torch.cat([latent, nothing], dim=1), state)
        return latent
