"""Tiles in space: put together seamlessly, combined with streams, chosen from a memory budget."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from osp.devices.live import LiveBytes
from osp.errors import UsageError
from osp.vae import WFVAE, Tiling, VideoVAE, fit_tiling, stream_decode, stream_encode
from osp.vae.memory import parse_bytes, working_bytes
from osp.vae.tiling import in_tiles


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 200), (96, 64), (104, 72), (32, 32)])
@pytest.mark.parametrize(("size", "overlap"), [(64, 16), (48, 0), (40, 32)])
def test_tiles_of_something_local_are_seamless(height: int, width: int, size: int, overlap: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 2, 3, height, width, dtype=torch.float64)
    seen = torch.zeros(height, width)

    def run(tile: Tensor, corner: tuple[int, int]) -> Tensor:
        assert max(tile.shape[3:]) <= size or max(height, width) <= size
        seen[corner[0] : corner[0] + tile.shape[3], corner[1] : corner[1] + tile.shape[4]] += 1
        return 3 * tile

    out = in_tiles(x, Tiling(size, overlap), run, pixel_in=1, pixel_out=1)
    torch.testing.assert_close(out, 3 * x, rtol=1e-6, atol=1e-6)
    assert seen.min() >= 1
    pooled = in_tiles(x, Tiling(size, overlap), lambda tile, _: shrunk(tile), pixel_in=1, pixel_out=8)
    torch.testing.assert_close(pooled, shrunk(x), rtol=1e-6, atol=1e-6)
    latent = x[..., : height // 8, : width // 8]
    grown = in_tiles(latent, Tiling(size, overlap), lambda tile, _: enlarged(tile), pixel_in=8, pixel_out=1)
    torch.testing.assert_close(grown, enlarged(latent), rtol=1e-6, atol=1e-6)


def shrunk(x: Tensor) -> Tensor:
    return F.avg_pool3d(x, (1, 8, 8))


def enlarged(x: Tensor) -> Tensor:
    return x.repeat_interleave(8, dim=3).repeat_interleave(8, dim=4)


@torch.no_grad()
def test_tiles_and_streams_together(any_vae: VideoVAE) -> None:
    tiling = Tiling(32, 16)
    latent = torch.randn(1, any_vae.latent_channels, 5, 6, 8, dtype=torch.float64)
    tiled = any_vae.decode(latent, tiling=tiling)
    untiled = any_vae.decode(latent)
    assert tiled.shape == untiled.shape
    assert 0 < (tiled - untiled).std() < untiled.std()
    for chunk in (1, 3):
        torch.testing.assert_close(any_vae.decode(latent, chunk, tiling), tiled, rtol=0, atol=1e-10)
        streamed = torch.cat(list(stream_decode(any_vae, latent.split(chunk, dim=2), tiling)), dim=2)
        torch.testing.assert_close(streamed, tiled, rtol=0, atol=1e-10)
    video = torch.randn(1, 3, 11, 48, 64, dtype=torch.float64)
    mean = any_vae.encode(video, tiling=tiling).mean
    assert mean.shape == any_vae.encode(video).mean.shape
    if any_vae.can_stream("encoder"):
        streamed = torch.cat([part.mean for part in stream_encode(any_vae, video.split(4, dim=2), tiling)], dim=2)
        torch.testing.assert_close(streamed, mean, rtol=0, atol=1e-10)
    any_vae.tiling = tiling
    torch.testing.assert_close(any_vae.decode(latent), tiled, rtol=0, atol=0)


def test_one_tile_is_the_whole_frame(any_vae: VideoVAE) -> None:
    latent = torch.randn(1, any_vae.latent_channels, 2, 3, 4, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(any_vae.decode(latent, tiling=Tiling(32, 8)), any_vae.decode(latent))


@pytest.mark.parametrize(("size", "overlap", "message"), [(60, 16, "size=60"), (64, 12, "overlap=12")])
def test_tiles_must_end_where_latent_pixels_do(any_vae: VideoVAE, size: int, overlap: int, message: str) -> None:
    with pytest.raises(UsageError, match=f"{message}: must be a multiple of 8"):
        any_vae.encode(torch.zeros(1, 3, 1, 128, 128, dtype=torch.float64), tiling=Tiling(size, overlap))


def test_an_overlap_leaves_something() -> None:
    with pytest.raises(UsageError, match=r"overlap=64: must be a whole number .* of at most 63"):
        Tiling(64, 64)


def test_the_estimate_is_what_is_used(any_vae: VideoVAE) -> None:
    vae = any_vae.float()
    latent = torch.zeros(1, vae.latent_channels, 9, 8, 8)
    with torch.no_grad(), LiveBytes() as live:
        vae.decode(latent)
    if vae.can_stream("decoder"):
        assert 0.8 <= live.peak / working_bytes(vae, "decoder", 64, 64) <= 1.02


def test_the_largest_tiles_within_a_budget() -> None:
    with torch.device("meta"):
        vae = WFVAE(latent_channels=8, base_channels=32, encoder_blocks=1, decoder_blocks=1)
    whole = fit_tiling(vae, 256, 384, "6GiB")
    tight = fit_tiling(vae, 256, 384, "300MiB")
    tighter = fit_tiling(vae, 256, 384, "150 MB")
    assert whole is None
    assert tight is not None
    assert tighter is not None
    assert 384 > tight.size > tighter.size > tighter.overlap == 64
    weights = 4 * sum(value.numel() for value in vae.state_dict().values())
    for tiling, budget in ((tight, 300 * 2**20), (tighter, 150 * 10**6)):
        size = tiling.size
        assert weights + working_bytes(vae, "decoder", min(size, 256), size) <= budget
        larger = size + 64
        assert weights + 1.2 * working_bytes(vae, "decoder", min(larger, 256), larger) > budget
    with pytest.raises(UsageError, match="max_memory=50MB is too little: for 96 pixels a side this VAE needs"):
        fit_tiling(vae, 256, 384, "50MB")


@pytest.mark.parametrize(
    ("text", "value"), [("6GiB", 6 << 30), ("1.5 gb", 1_500_000_000), ("800M", 800_000_000), (64, 64)]
)
def test_amounts_of_memory(text: str | int, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "six", "-1GiB", "6TiB", "0", "GiB"])
def test_what_is_no_amount_of_memory(text: str) -> None:
    with pytest.raises(UsageError, match="max_memory="):
        parse_bytes(text)
