"""The simplest VAE of the family: keep the lowest Haar band, drop the others. What a trained VAE has to beat."""

import torch
from torch import Tensor, nn

from osp.errors import UsageError
from osp.vae.posterior import GaussianPosterior
from osp.vae.wavelet import HaarTransform, InverseHaarTransform, haar_filters_2d, haar_filters_3d


class LowestBand(nn.Module):
    """Three Haar levels at the WF-VAE's down-sampling, of which the three channels of the lowest band are the latent.

    `time_stride` is 4 (level 1 in space only) or 8. Raises UsageError for another.
    """

    space_stride = 8

    def __init__(self, time_stride: int) -> None:
        super().__init__()
        if time_stride not in (4, 8):
            raise UsageError(f"time_stride={time_stride} is not one of the family's; choose 4 or 8")
        self.time_stride = time_stride
        three, two = haar_filters_3d(), haar_filters_2d()
        levels = (three, two if time_stride == 4 else three, three)
        self.analysis = nn.ModuleList(HaarTransform(filters) for filters in levels)
        self.synthesis = nn.ModuleList(InverseHaarTransform(filters) for filters in reversed(levels))
        self._dropped_bands = [len(filters) - 1 for filters in reversed(levels)]

    def encode(self, video: Tensor) -> GaussianPosterior:
        """`B 3 T H W` -> a posterior without variance over `B 3 1+(T-1)/time_stride H/8 W/8`."""
        for level in self.analysis:
            video = level(video)[:, :3]
        return GaussianPosterior(video, torch.full_like(video, -30.0))

    def decode(self, latent: Tensor) -> Tensor:
        """`B 3 T H W` -> `B 3 1+(T-1)*time_stride 8H 8W`, with every other band zero."""
        for level, dropped in zip(self.synthesis, self._dropped_bands, strict=True):
            latent = level(torch.cat([latent, torch.zeros_like(latent).repeat(1, dropped, 1, 1, 1)], dim=1))
        return latent
