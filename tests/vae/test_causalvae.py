"""Sizes, shapes and streaming of the CausalVideoVAE family."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from osp.errors import UsageError
from osp.vae import CausalVideoVAE
from osp.vae.causalvae import (
    MixedAttention,
    MixedTimeDownsample,
    MixedTimeUpsample,
    TimeDownsample,
    TimeUpsample,
)
from osp.vae.layers import FrameAttention
from osp.vae.stream import StreamState
from osp.weights import causalvae as published

MANIFESTS = Path(__file__).parent.parent / "golden" / "manifests"
SIZES = {
    "causalvae_defaults_4x8x8_4ch": 229_169_895,
    "odvae_v1_2_4x8x8_4ch": 239_189_991,
    "causalvae_v1_0_release": 229_169_895,
    "causalvae_v1_1_release": 246_859_499,
    "odvae_v1_2_release": 239_189_991,
}


def tiny(**settings: object) -> CausalVideoVAE:
    small = {"base_channels": 8, "multipliers": [1, 2, 4], "blocks": 1, "norm": "layer"}
    levels = {
        "encoder_blocks": ["2d", "3d", "3d"],
        "encoder_resize": ["frame", "space_time", "none"],
        "encoder_time": ["plain", "none", "none"],
        "decoder_blocks": ["2d", "3d", "3d"],
        "decoder_resize": ["none", "space", "space_time"],
        "decoder_time": ["none", "plain", "none"],
    }
    return CausalVideoVAE(**{**small, **levels, **settings})


@pytest.mark.parametrize("name", SIZES)
def test_full_size_parameters_and_keys_are_the_published_ones(name: str) -> None:
    manifest = json.loads(gzip.decompress((MANIFESTS / f"{name}.json.gz").read_bytes()))
    with torch.device("meta"):
        vae = published.build(manifest["config"])
    pairs = list(published.key_pairs(vae))
    keys = {key: list(pair.published_shape) for pair in pairs for key in pair.published}
    assert keys == manifest["keys"]
    assert sum(value.numel() for value in vae.parameters()) == SIZES[name] == manifest["params_total"]
    assert (vae.time_stride, vae.space_stride, vae.latent_channels) == (4, 8, 4)
    assert {pair.ours for pair in pairs} == set(vae.state_dict())


def in_chunks(module: nn.Module, x: Tensor, chunk: int) -> Tensor:
    state, pieces = StreamState(), []
    for start in range(0, x.shape[2], chunk):
        pieces.append(module(x[:, :, start : start + chunk], state))
    state.last = True
    pieces.append(module(x[:, :, :0], state))  # the end may be known late
    return torch.cat(pieces, dim=2)


@pytest.mark.parametrize("part", ["encoder", "decoder", "down", "up", "mixed down", "mixed up"])
@torch.no_grad()
def test_layers_give_the_whole_clip_result_in_chunks(part: str) -> None:
    torch.manual_seed(0)
    vae = tiny().double().eval()
    # With the published norm over all frames in its place, the encoder cannot stream; everything else in it can.
    vae.encoder.mid[1] = FrameAttention(32, norm="layer").double()
    module, channels = {
        "encoder": (vae.encoder, 3),
        "decoder": (vae.decoder, 4),
        "down": (TimeDownsample(), 2),
        "up": (TimeUpsample(), 2),
        "mixed down": (MixedTimeDownsample(2).double(), 2),
        "mixed up": (MixedTimeUpsample(2).double(), 2),
    }[part]
    for frames in (1, 5, 13):
        x = torch.randn(1, channels, frames, 8, 8, dtype=torch.float64)
        whole = module(x)
        for chunk in (1, 2, 3, 5, 13):
            torch.testing.assert_close(in_chunks(module, x, chunk), whole, rtol=0, atol=1e-10)


@torch.no_grad()
def test_sizes_of_clip_and_latent_fit() -> None:
    vae = tiny().eval()
    assert (vae.time_stride, vae.space_stride) == (4, 4)
    latent = vae.encode(torch.randn(1, 3, 9, 8, 12)).mean
    assert latent.shape == (1, 4, 3, 2, 3)
    assert vae.decode(latent).shape == (1, 3, 9, 8, 12)


def test_norms_over_all_frames_cannot_stream() -> None:
    vae = tiny().eval()
    assert not vae.can_stream("encoder")
    assert vae.can_stream("decoder")
    with pytest.raises(UsageError, match="cannot stream"):
        vae.encode(torch.zeros(1, 3, 9, 8, 8), chunk_frames=4)
    with pytest.raises(UsageError, match="cannot stream"):
        MixedAttention(32)(torch.zeros(1, 32, 1, 2, 2), StreamState())


@torch.no_grad()
def test_the_older_attention_is_the_other_one_for_a_single_frame_only() -> None:
    torch.manual_seed(0)
    mixed, frame = MixedAttention(32), FrameAttention(32, norm="group")
    frame.load_state_dict(mixed.state_dict())
    x = torch.randn(2, 32, 3, 4, 4)
    torch.testing.assert_close(mixed(x[:, :, :1]), frame(x[:, :, :1]))
    assert not torch.allclose(mixed(x), frame(x), atol=1e-2)


def test_settings_build_the_same_vae_again() -> None:
    vae = tiny(dropout=0.1)
    again = CausalVideoVAE(**json.loads(json.dumps(vae.settings)))
    assert again.settings == vae.settings
    assert again.config == vae.config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base": 3}, "no setting base"),
        ({"latent_channels": 0}, "latent_channels=0"),
        ({"blocks": True}, "blocks=true: must be a whole number"),
        ({"multipliers": []}, "multipliers is empty"),
        ({"multipliers": [1, "2", 4]}, "multipliers=2"),
        ({"multipliers": [1, 2]}, "encoder_blocks=.*one entry a level"),
        ({"encoder_blocks": "3d3"}, "encoder_blocks=3d3"),
        ({"encoder_blocks": ["3d", "4d", "3d"]}, "encoder_blocks=4d: is not known"),
        ({"decoder_resize": ["none", "space", "time"]}, "decoder_resize=time: is not known"),
        ({"encoder_time": ["half", "none", "none"]}, "encoder_time=half: is not known"),
        ({"encoder_attention": "none"}, "encoder_attention=none: is not known"),
        ({"encoder_time": ["none", "none", "none"]}, r"shrinks .*\(2, 4\).*grows .*\(4, 4\)"),
        ({"norm": "batch"}, "norm=batch: is not known"),
        ({"norm": "group"}, "multiples of 32"),
    ],
)
def test_shapes_that_cannot_be_built_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        tiny(**settings)


@torch.no_grad()
def test_mixed_layers_mix_what_the_plain_ones_give_with_a_convolution() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 4, 6, dtype=torch.float64)
    for mixed, plain in ((MixedTimeDownsample(3), TimeDownsample()), (MixedTimeUpsample(3), TimeUpsample())):
        mixed.double()
        alone = plain(x)
        convolved = mixed.conv(x if isinstance(plain, TimeDownsample) else alone)
        expected = 0.880797078 * alone + 0.119202922 * convolved
        torch.testing.assert_close(mixed(x), expected, rtol=0, atol=1e-8)
        mixed.mix_factor.fill_(1e4)
        assert torch.equal(mixed(x), alone)
        mixed.mix_factor.fill_(-1e4)
        assert torch.equal(mixed(x), convolved)


def test_gradients_of_mixed_layers_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    for layer in (MixedTimeDownsample(2).double(), MixedTimeUpsample(2).double()):
        x = torch.randn(1, 2, 5, 2, 3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, factor, layer=layer: layer(x), (x, layer.mix_factor))


def test_settings_of_time_that_were_saved_as_true_and_false_build_the_same_vae() -> None:
    former = {"encoder_time": [True, False, False], "decoder_time": [False, True, False]}
    assert tiny(**former).config == tiny().config


def test_colours_go_through_a_new_vae() -> None:
    """So that it learns more than the mean of all clips: the latent is no weaker than what is added to it."""
    torch.manual_seed(0)
    colours = torch.rand(16, 3, 1, 1, 1).mul(2).sub(1).expand(-1, -1, 1, 32, 32)
    vae = tiny()
    with torch.no_grad():
        posterior = vae.encode(colours)
        decoded = vae.decode(posterior.mode())
    assert posterior.mean.std(0).mean() > 2 * posterior.logvar.mul(0.5).exp().mean()
    assert decoded.mean((2, 3, 4)).std(0).mean() > 0.05


def test_a_pass_in_training_gives_a_reconstruction_and_gradients_everywhere() -> None:
    torch.manual_seed(0)
    vae = tiny(encoder_time=["mixed", "none", "none"], decoder_time=["none", "mixed", "none"])
    for weight in vae.parameters():  # residual branches of a new VAE end in zeros, which let no gradient behind them
        torch.nn.init.normal_(weight, std=0.1)
    result = vae(torch.randn(2, 3, 6, 8, 8))  # 6 frames, which the VAE fills up
    assert result.reconstruction.shape == (2, 3, 6, 8, 8)
    assert result.encoder_coefficients == ()
    (result.reconstruction.square().mean() + result.posterior.kl().mean()).backward()
    assert [name for name, value in vae.named_parameters() if value.grad is None or not value.grad.abs().sum()] == []
