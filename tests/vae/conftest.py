"""VAEs small enough to run in float64 hundreds of times."""

from collections.abc import Callable

import pytest
import torch

from osp.vae import WFVAE, CausalVideoVAE, VideoVAE, convolution


def build_wfvae(**settings: object) -> WFVAE:
    small = {"latent_channels": 4, "base_channels": 4, "encoder_flow_channels": 4, "decoder_flow_channels": 6}
    return WFVAE(**{**small, "encoder_blocks": 1, "decoder_blocks": 1, **settings})


def build_odvae() -> CausalVideoVAE:
    """v1.2's layers in small; its decoder streams, its encoder has a group norm and cannot."""
    return CausalVideoVAE(
        base_channels=8,
        multipliers=(1, 1, 2, 4),
        blocks=1,
        norm="layer",
        conv_in="2d",
        encoder_blocks=("2d", "2d", "3d", "3d"),
        encoder_resize=("space", "space_time", "space_time", "none"),
        encoder_time=("none",) * 4,
        decoder_resize=("none", "frame", "space_time", "space_time"),
        decoder_time=("none",) * 4,
    )


def build_causalvae_v11() -> CausalVideoVAE:
    """v1.1's layers in small: time is halved and doubled by mixed layers."""
    return CausalVideoVAE(
        base_channels=8,
        multipliers=(1, 1, 2, 4),
        blocks=1,
        norm="layer",
        conv_in="2d",
        encoder_blocks=("2d", "2d", "3d", "3d"),
        encoder_resize=("frame", "frame", "frame", "none"),
        encoder_time=("none", "mixed", "mixed", "none"),
        decoder_time=("none", "none", "mixed", "mixed"),
    )


VAES = {
    "4x8x8": lambda: build_wfvae(level1="2d"),
    "8x8x8": lambda: build_wfvae(level1="3d"),
    "nearest": lambda: build_wfvae(level1="2d", temporal_interpolation="nearest", attention=False),
    "od-vae": build_odvae,
    "v1.1": build_causalvae_v11,
}


@pytest.fixture
def tiny_wfvae() -> Callable[..., WFVAE]:
    """Builds a tiny WF-VAE with the given settings."""
    return build_wfvae


@pytest.fixture(params=VAES)
def any_vae(request: pytest.FixtureRequest) -> VideoVAE:
    """One VAE of each kind, in float64."""
    torch.manual_seed(0)
    return VAES[request.param]().double().eval()


@pytest.fixture
def sliding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions slide over frames of any size, as they do over large ones."""
    monkeypatch.setattr(convolution, "SMALL_FRAME", 0)
