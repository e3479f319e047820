"""The VAE's loss terms and the adversarial ones."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from osp.errors import UsageError
from osp.training.discriminator import Balance, PatchDiscriminator, hinge_loss
from osp.training.losses import VAELoss
from osp.vae import GaussianPosterior
from osp.vae.autoencoder import Autoencoding


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
    discriminator = PatchDiscriminator()
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
        logits = PatchDiscriminator()(torch.empty(1, 3, 25, 256, 256))
    assert logits.shape == (1, 1, 7, 16, 16)


def test_hinge_loss_is_zero_beyond_the_margin_only() -> None:
    assert hinge_loss(torch.tensor([2.0]), torch.tensor([-1.5])).item() == 0.0
    assert hinge_loss(torch.tensor([0.0]), torch.tensor([0.5])).item() == pytest.approx(0.5 * (1.0 + 1.5))


@pytest.mark.parametrize(("floor", "most"), [(1e-6, 1e6), (1e-4, 1e4)])
def test_the_adversarial_weight_is_the_ratio_of_gradients(floor: float, most: float) -> None:
    balance = Balance(0.5, floor=floor, most=most)
    weight = torch.tensor([3.0, 4.0], requires_grad=True)
    ratio = balance((weight * torch.tensor([6.0, 8.0])).sum(), (weight * torch.tensor([0.0, 2.0])).sum(), weight)
    assert ratio.item() == pytest.approx(0.5 * 10.0 / (2.0 + floor))
    assert not ratio.requires_grad
    assert balance(weight.sum() * 1e12, (weight * 0).sum(), weight).item() == pytest.approx(0.5 * most)
    small = balance((weight * 1e-3).sum(), (weight * 1e-4).sum(), weight).item()
    assert small == pytest.approx(0.5 * 2**0.5 * 1e-3 / (2**0.5 * 1e-4 + floor))


def test_discriminators_of_earlier_versions_have_the_published_strides_and_widths() -> None:
    frames, clips = PatchDiscriminator(64, 3, 0.0, "2d"), PatchDiscriminator(64, 3, 0.0, "3d")
    for one, kernel, strides in (
        (frames, (4, 4), [(2, 2), (2, 2), (2, 2), (1, 1), (1, 1)]),
        (clips, (3, 3, 3), [(2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 1, 1), (1, 1, 1)]),
    ):
        convolutions = [layer for layer in one.layers if isinstance(layer, nn.Conv2d | nn.Conv3d)]
        assert [layer.out_channels for layer in convolutions] == [64, 128, 256, 512, 1]
        assert [layer.stride for layer in convolutions] == strides
        assert {layer.kernel_size for layer in convolutions} == {kernel}
        assert [layer.bias is not None for layer in convolutions] == [True, False, False, False, True]
        assert max(layer.weight.std().item() for layer in convolutions) == pytest.approx(0.02, rel=0.1)
    video = torch.randn(2, 3, 5, 32, 32)
    assert frames(video).shape == (10, 1, 2, 2)
    assert clips(video).shape == (2, 1, 2, 4, 4)


def test_a_discriminator_of_frames_sees_each_frame_alone() -> None:
    judge = PatchDiscriminator(4, 1, 0.0, "2d").eval()
    video = torch.randn(1, 3, 4, 16, 16)
    other = video.clone()
    other[:, :, 2] += 1.0
    changed = (judge(video) - judge(other)).abs().flatten(1).sum(1) > 0
    assert changed.tolist() == [False, False, True, False]


def test_other_discriminators_are_refused() -> None:
    with pytest.raises(UsageError, match=r"module\.discriminator\.dimensions=4d: is not known.*2d.*3d"):
        PatchDiscriminator(dimensions="4d")
    with pytest.raises(UsageError, match=r"module\.discriminator\.layers=0"):
        PatchDiscriminator(layers=0)


def test_a_vae_without_wavelets_has_no_such_term() -> None:
    video = torch.zeros(2, 3, 5, 16, 16)
    result = replace(autoencoding(video, 0.5), encoder_coefficients=(), decoder_coefficients=())
    got = VAELoss(wavelet_weight=0)(video, result)
    assert [*got.terms] == ["pixel", "kl"]
    assert got.total.item() == pytest.approx(got.reconstruction.item() + got.terms["kl"].item())
