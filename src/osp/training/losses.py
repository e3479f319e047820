"""The losses that a video VAE is trained to minimise, without that of the discriminator."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from osp.checks import check_choice
from osp.evaluation.lpips import PerceptualDistance
from osp.vae.autoencoder import Autoencoding


@dataclass(frozen=True)
class LossTerms:
    """The weighted terms by name, all scalars, and `reconstruction`: pixels and perception without the regularisers."""

    reconstruction: Tensor
    terms: dict[str, Tensor]

    @property
    def total(self) -> Tensor:
        """The sum of reconstruction and regularisers."""
        total = self.reconstruction + self.terms["kl"]
        return total + self.terms["wavelet_flow"] if "wavelet_flow" in self.terms else total


class VAELoss:
    """Reconstruction, perception, divergence and wavelet flow, reduced as the published training does.

    Pixels: |x - y| (or its square) plus `perceptual_weight` times the frame's perceptual distance at every pixel,
    summed over everything and divided by the number of frames. Divergence and wavelet flow (the L1 distance between
    the encoder's and the decoder's coefficients at both inner levels) are summed over each clip; a VAE without wavelets
    has `wavelet_weight` 0. The published loss divides the pixels by a learnable variance that it keeps at 1, so there
    is none here.
    """

    def __init__(
        self,
        *,
        pixel: Literal["l1", "l2"] = "l1",
        perceptual: PerceptualDistance | None = None,
        perceptual_weight: float = 1.0,
        kl_weight: float = 1e-6,
        wavelet_weight: float = 0.1,
    ) -> None:
        check_choice("module.loss.pixel", pixel, ("l1", "l2"))
        self.pixel = pixel
        self.perceptual = perceptual
        self.perceptual_weight = perceptual_weight
        self.kl_weight = kl_weight
        self.wavelet_weight = wavelet_weight

    def __call__(self, video: Tensor, result: Autoencoding) -> LossTerms:
        """`B 3 T H W` and what the VAE made of it -> the loss terms."""
        error = result.reconstruction.float() - video
        pixels = error.abs() if self.pixel == "l1" else error.square()
        batch, _, frames = video.shape[:3]
        reconstruction = pixels.sum() / (batch * frames)
        terms = {"pixel": reconstruction}
        if self.perceptual is not None:
            distance = self.perceptual(result.reconstruction.float(), video)  # B T
            terms[self.perceptual.name] = distance.mean()
            values_per_frame = video[0, :, 0].numel()
            reconstruction = reconstruction + self.perceptual_weight * distance.mean() * values_per_frame
        terms["kl"] = self.kl_weight * result.posterior.kl().mean()
        if result.encoder_coefficients:
            levels = zip(result.decoder_coefficients, result.encoder_coefficients, strict=True)
            flow = torch.stack([(ours.float() - theirs.float()).abs().sum() / batch for ours, theirs in levels])
            terms["wavelet_flow"] = self.wavelet_weight * flow.sum()
        return LossTerms(reconstruction, terms)
