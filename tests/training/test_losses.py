"""The VAE's loss terms and the adversarial ones."""

import pytest
import torch
from torch import Tensor, nn

from osp.training.discriminator import PatchDiscriminator3d, adaptive_weight, hinge_loss
from osp.training.losses import VAELoss
from osp.vae import GaussianPosterior
from osp.vae.wfvae import Autoencoding


class FrameDistance(nn.Module):
    """A stand-in with known values: 0.5 for every frame."""

    name = "distance"

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.full((a.shape[0], a.shape[2]), 0.5)


def autoencoding(video: Tensor, offset: float) -> Autoencoding:
    latent = torch.ones(2, 4, 2, 2, 2)
    coefficients = (torch.zeros(2, 12, 3, 2, 2), torch.zeros(2, 24, 2, 1, 1))
    shifted = tuple(c + 0.25 for c in coefficients)
    return Autoencoding(video + offset, GaussianPosterior(latent, torch.zeros_like(latent)), coefficients, shifted)


@pytest.mark.parametrize(("pixel", "per_value"), [("l1", 0.5), ("l2", 0.25)])
def test_terms_are_summed_as_published(pixel: str, per_value: float) -> None:
    video = torch.zeros(2, 3, 5, 16, 16)
    loss = VAELoss(pixel=pixel, perceptual=FrameDistance(), perceptual_weight=2.0, kl_weight=0.1, wavelet_weight=0.01)
    got = loss(video, autoencoding(video, 0.5))
    values_per_frame = 3 * 16 * 16
    assert got.terms["pixel"].item() == pytest.approx(per_value * values_per_frame)
    assert got.terms["distance"].item() == pytest.approx(0.5)
    # The perceptual distance of a frame is added to each of its values before the sum.
    assert got.reconstruction.item() == pytest.approx((per_value + 2.0 * 0.5) * values_per_frame)
    # KL of N(1, 1) from N(0, 1) is 1/2 for each of a clip's 32 latent values.
    assert got.terms["kl"].item() == pytest.approx(0.1 * 0.5 * 32)
    coefficients_per_clip = 12 * 3 * 2 * 2 + 24 * 2
    assert got.terms["wavelet_flow"].item() == pytest.approx(0.01 * 0.25 * coefficients_per_clip)
    assert got.total.item() == pytest.approx(
        got.reconstruction.item() + got.terms["kl"].item() + got.terms["wavelet_flow"].item()
    )


def test_discriminator_has_the_published_strides_and_widths() -> None:
    discriminator = PatchDiscriminator3d()
    convolutions = [layer for layer in discriminator.layers if isinstance(layer, nn.Conv3d)]
    assert [layer.out_channels for layer in convolutions] == [64, 128, 256, 512, 512, 1]
    assert [layer.stride for layer in convolutions] == [
        (2, 2, 2),
        (2, 2, 2),
        (1, 2, 2),
        (1, 2, 2),
        (1, 1, 1),
        (1, 1, 1),
    ]
    with torch.device("meta"):
        logits = PatchDiscriminator3d()(torch.empty(1, 3, 25, 256, 256))
    assert logits.shape == (1, 1, 7, 16, 16)


def test_hinge_loss_is_zero_beyond_the_margin_only() -> None:
    assert hinge_loss(torch.tensor([2.0]), torch.tensor([-1.5])).item() == 0.0
    assert hinge_loss(torch.tensor([0.0]), torch.tensor([0.5])).item() == pytest.approx(0.5 * (1.0 + 1.5))


def test_adaptive_weight_is_the_ratio_of_gradients() -> None:
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    ratio = adaptive_weight(
        (weight * torch.tensor([6.0, 8.0])).sum(), (weight * torch.tensor([0.0, 2.0])).sum(), weight
    )
    assert ratio.item() == pytest.approx(10.0 / 2.0)
    assert not ratio.requires_grad
    assert adaptive_weight(weight.sum() * 1e12, (weight * 0).sum(), weight).item() == pytest.approx(1e6)
