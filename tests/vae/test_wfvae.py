"""Shapes, sizes, causality and streaming of the WF-VAE's layers."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from osp.errors import UsageError
from osp.vae import WFVAE
from osp.vae.stream import StreamState
from osp.weights import wfvae as published

Build = Callable[..., WFVAE]
MANIFESTS = Path(__file__).parent.parent / "golden" / "manifests"

# FACTS of the published models: (manifest, encoder, decoder)
SIZES = {
    "wfvae_v1_3_4x8x8_4ch": 146_496_836,
    "wfvae_v1_3_4x8x8_8ch": 38_268_304 + 108_394_428,
    "wfvae_large_16ch": 317_081_372,
    "wfvae_v1_5_8x8x8_32ch": 60_326_464 + 166_709_352,
}


@pytest.mark.parametrize("name", SIZES)
def test_full_size_parameters_and_keys_are_the_published_ones(name: str) -> None:
    manifest = json.loads(gzip.decompress((MANIFESTS / f"{name}.json.gz").read_bytes()))
    with torch.device("meta"):
        vae = published.build(manifest["config"])
    keys = {key: list(pair.published_shape) for pair in published.key_pairs(vae) for key in pair.published}
    assert keys == manifest["keys"]
    assert len(keys) == manifest["n_keys"]
    assert sum(value.numel() for value in vae.parameters()) == SIZES[name] == manifest["params_total"]
    assert sum(value.numel() for value in vae.parameters() if value.requires_grad) == manifest["params_trainable"]
    for half, size in manifest["params_by_prefix"].items():
        assert sum(value.numel() for key, value in vae.named_parameters() if key.startswith(half)) == size
    assert {pair.ours for pair in published.key_pairs(vae)} == set(vae.state_dict())


@pytest.mark.parametrize("level1", ["2d", "3d"])
def test_no_frame_depends_on_a_later_group(level1: str, tiny_wfvae: Build) -> None:
    torch.manual_seed(0)
    vae = tiny_wfvae(level1=level1).double().eval()
    video = torch.randn(1, 3, 2 * vae.time_stride + 1, 16, 16, dtype=torch.float64)
    changed = video.clone()
    changed[:, :, vae.time_stride + 1 :] += 1
    with torch.no_grad():
        a, b = vae.encode(video).mean, vae.encode(changed).mean
    torch.testing.assert_close(a[:, :, :2], b[:, :, :2], rtol=0, atol=0)
    assert not torch.allclose(a[:, :, 2], b[:, :, 2])


def test_group_norm_over_time_refuses_to_stream(tiny_wfvae: Build) -> None:
    vae = tiny_wfvae(base_channels=32, encoder_flow_channels=32, decoder_flow_channels=32, norm="group")
    assert vae.encode(torch.zeros(1, 3, 5, 16, 16)).mean.shape == (1, 4, 2, 2, 2)
    with pytest.raises(UsageError, match="cannot stream"):
        vae.encoder(torch.zeros(1, 3, 5, 16, 16), StreamState())


@pytest.mark.parametrize(
    ("size", "message"),
    [((5, 20, 16), "height=20"), ((5, 16, 4), "width=4: must .* use 8")],
)
def test_sizes_that_do_not_fit_are_refused(size: tuple[int, int, int], message: str, tiny_wfvae: Build) -> None:
    with pytest.raises(UsageError, match=message):
        tiny_wfvae().encode(torch.zeros(1, 3, *size))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"level1": "4d"}, "level1="),
        ({"latent_channels": 0}, "latent_channels=0"),
        ({"norm": "batch"}, "norm="),
        ({"base": 3}, "no setting base; it has"),
        ({"norm": "group"}, "group norm needs channels in multiples of 32, got 4"),
    ],
)
def test_shapes_that_cannot_be_built_are_refused(settings: dict, message: str, tiny_wfvae: Build) -> None:
    with pytest.raises(UsageError, match=message):
        tiny_wfvae(**settings)


def test_posterior_samples_and_divergence(tiny_wfvae: Build) -> None:
    posterior = tiny_wfvae().encode(torch.randn(2, 3, 5, 16, 16))
    draws = [posterior.sample(torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*draws)
    normal = torch.distributions.Normal(posterior.mean, (0.5 * posterior.logvar).exp())
    standard = torch.distributions.Normal(0.0, 1.0)
    expected = torch.distributions.kl_divergence(normal, standard).sum(dim=(1, 2, 3, 4))
    torch.testing.assert_close(posterior.kl(), expected, rtol=1e-4, atol=1e-4)


def test_training_takes_any_number_of_frames(tiny_wfvae: Build) -> None:
    video = torch.randn(1, 3, 6, 16, 16)
    result = tiny_wfvae()(video)
    assert result.reconstruction.shape == video.shape
    assert result.posterior.frames == 6
    assert [a.shape for a in result.encoder_coefficients] == [b.shape for b in result.decoder_coefficients]
