"""Streams: the whole clip's result in pieces of any length, for any number of frames, in memory that does not grow."""

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from osp.devices.live import LiveBytes
from osp.errors import UsageError
from osp.vae import WFVAE, GaussianPosterior, VideoVAE, stream_decode, stream_encode
from osp.vae.layers import CausalConv3d
from osp.vae.wavelet import HaarTransform, InverseHaarTransform

CHUNKS = (1, 2, 3, 5, 8, 16)
LENGTHS = (*range(1, 42), 93, 121, 137)


def whole_moments(vae: VideoVAE, video: Tensor) -> Tensor:
    return GaussianPosterior.from_moments(vae.encode_moments(vae.pad_frames(video)))


def same(ours: Tensor, theirs: Tensor, chunk: int) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10, msg=lambda said: f"pieces of {chunk}: {said}")


@torch.no_grad()
def test_streamed_encoding_equals_whole(any_vae: VideoVAE) -> None:
    longest = torch.randn(1, 3, max(LENGTHS), 8, 8, dtype=torch.float64)
    if not any_vae.can_stream("encoder"):
        with pytest.raises(UsageError, match="encoder of this CausalVideoVAE has group norms over time"):
            any_vae.encode(longest, chunk_frames=1)
        return
    for frames in LENGTHS:
        video = longest[:, :, :frames]
        whole = whole_moments(any_vae, video)
        for chunk in CHUNKS:
            streamed = any_vae.encode(video, chunk_frames=chunk)
            assert streamed.frames == frames
            same(streamed.mean, whole.mean, chunk)
            same(streamed.logvar, whole.logvar, chunk)


@torch.no_grad()
def test_streamed_decoding_equals_whole(any_vae: VideoVAE) -> None:
    stride = any_vae.time_stride
    longest = torch.randn(1, any_vae.latent_channels, 1 + -(-max(LENGTHS) // stride), 1, 1, dtype=torch.float64)
    for frames in sorted({1 + -(-(frames - 1) // stride) for frames in LENGTHS}):
        latent = longest[:, :, :frames]
        whole = any_vae.decode_latent(latent)
        assert whole.shape == (1, 3, 1 + (frames - 1) * stride, 8, 8)
        for chunk in CHUNKS:
            same(any_vae.decode(latent, chunk_frames=chunk), whole, chunk)
            same(torch.cat([*stream_decode(any_vae, latent.split(chunk, 2))], 2), whole, chunk)


@torch.no_grad()
def test_sliding_convolutions_give_the_same(any_vae: VideoVAE, request: pytest.FixtureRequest) -> None:
    video = torch.randn(2, 3, 1 + 5 * any_vae.time_stride, 16, 8, dtype=torch.float64)
    latent = torch.randn(2, any_vae.latent_channels, 6, 2, 1, dtype=torch.float64)
    moments, decoded = whole_moments(any_vae, video), any_vae.decode_latent(latent)
    request.getfixturevalue("sliding")
    torch.testing.assert_close(any_vae.encode(video).mean, moments.mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(any_vae.decode(latent), decoded, rtol=0, atol=1e-10)
    for chunk in (1, 3):
        torch.testing.assert_close(any_vae.decode(latent, chunk_frames=chunk), decoded, rtol=0, atol=1e-10)


@torch.no_grad()
def test_streams_side_by_side_do_not_touch_each_other(any_vae: VideoVAE) -> None:
    a, b = torch.randn(2, 1, any_vae.latent_channels, 7, 2, 2, dtype=torch.float64)
    got: dict[str, list[Tensor]] = {"a": [], "b": []}
    streams = {"a": stream_decode(any_vae, a.split(2, dim=2)), "b": stream_decode(any_vae, b.split(3, dim=2))}
    while streams:
        for name in list(streams):
            if (piece := next(streams[name], None)) is None:
                del streams[name]
            else:
                got[name].append(piece)
                any_vae.decode(torch.zeros_like(a[:, :, :1]))  # and a whole clip in between
    for name, latent in (("a", a), ("b", b)):
        torch.testing.assert_close(torch.cat(got[name], dim=2), any_vae.decode_latent(latent), rtol=0, atol=1e-10)


def frames_seen(vae: VideoVAE, work: Callable[[], object]) -> Counter[str]:
    """How many frames each layer with a kernel was given."""
    seen: Counter[str] = Counter()
    handles = []
    for name, module in vae.named_modules():
        if isinstance(module, CausalConv3d | HaarTransform | InverseHaarTransform):
            handles.append(
                module.register_forward_hook(lambda m, args, out, name=name: seen.update({name: args[0].shape[2]}))
            )
    work()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("chunk", [1, 3, 16, None])
@torch.no_grad()
def test_no_convolution_sees_a_frame_twice(any_vae: VideoVAE, chunk: int | None) -> None:
    video = torch.randn(1, 3, 41, 8, 8, dtype=torch.float64)
    latent = torch.randn(1, any_vae.latent_channels, 9, 1, 1, dtype=torch.float64)
    if any_vae.can_stream("encoder"):
        once = frames_seen(any_vae, lambda: any_vae.encode_moments(video))
        assert len(once) > 10
        assert frames_seen(any_vae, lambda: any_vae.encode(video, chunk_frames=chunk)) == once
    once = frames_seen(any_vae, lambda: any_vae.decode_latent(latent))
    assert len(once) > 10
    assert frames_seen(any_vae, lambda: any_vae.decode(latent, chunk_frames=chunk)) == once


@torch.no_grad()
def test_any_number_of_frames_comes_back_and_none_is_lost(any_vae: VideoVAE) -> None:
    # One object, in any order: images, clips, other sizes.
    for frames, height, width in ((1, 16, 16), (9, 24, 16), (2, 16, 24), (1, 24, 24), (34, 16, 16), (6, 16, 16)):
        video = torch.randn(1, 3, frames, height, width, dtype=torch.float64)
        posterior = any_vae.encode(video)
        assert posterior.frames == frames
        held = any_vae.decode(posterior.mode())
        assert held.shape[2] - any_vae.time_stride < frames <= held.shape[2]
        assert any_vae.decode(posterior.mode(), frames=posterior.frames).shape == video.shape
        still = torch.cat([video, video[:, :, -1:].expand(-1, -1, held.shape[2] - frames, -1, -1)], dim=2)
        torch.testing.assert_close(any_vae.encode(still).mean, posterior.mean, rtol=0, atol=0)


@torch.no_grad()
def test_an_iterator_of_pieces_of_any_lengths(any_vae: VideoVAE) -> None:
    if not any_vae.can_stream("encoder"):
        pytest.skip("the encoder cannot stream")
    video = torch.randn(1, 3, 38, 8, 8, dtype=torch.float64)
    pulled = []

    def camera() -> Iterator[Tensor]:
        for piece in video.split([1, 7, 2, 16, 12], dim=2):
            pulled.append(piece.shape[2])
            yield piece

    posteriors = stream_encode(any_vae, camera())
    first = next(posteriors)
    assert pulled == [1]  # nothing waits for the end of the clip
    latents = [first.mode(), *(posterior.mode() for posterior in posteriors)]
    torch.testing.assert_close(torch.cat(latents, dim=2), any_vae.encode(video).mean, rtol=0, atol=1e-10)
    decoded = torch.cat(list(stream_decode(any_vae, latents)), dim=2)
    torch.testing.assert_close(decoded, any_vae.decode(torch.cat(latents, dim=2)), rtol=0, atol=1e-10)


@torch.no_grad()
def test_memory_of_a_stream_does_not_grow(any_vae: VideoVAE) -> None:
    stride, peaks = any_vae.time_stride, {}
    for frames in (33, 129, 513):
        latents = 1 + (frames - 1) // stride
        pieces = (torch.zeros(1, any_vae.latent_channels, min(8, latents - i), 2, 2) for i in range(0, latents, 8))
        vae = any_vae.float()
        with LiveBytes() as live:
            for piece in stream_decode(vae, pieces):
                del piece
        peaks[frames] = live.peak
    whole = LiveBytes()
    with whole:
        any_vae.decode_latent(torch.zeros(1, any_vae.latent_channels, 1 + 512 // stride, 2, 2))
    assert peaks[513] <= 1.1 * peaks[33], peaks
    assert peaks[513] >= 0.9 * peaks[33], peaks
    assert whole.peak > 5 * peaks[513]


@torch.no_grad()
def test_what_does_not_fit_a_stream_is_refused(any_vae: VideoVAE) -> None:
    latent = torch.zeros(1, any_vae.latent_channels, 2, 2, 2, dtype=torch.float64)
    with pytest.raises(UsageError, match="keeps its size"):
        list(stream_decode(any_vae, [latent, latent[..., :1]]))
    with pytest.raises(UsageError, match="no latents"):
        list(stream_decode(any_vae, []))
    with pytest.raises(UsageError, match="chunk_frames=0"):
        any_vae.decode(latent, chunk_frames=0)
    with pytest.raises(UsageError, match="frames=40"):
        any_vae.decode(latent, frames=40)
    with pytest.raises(UsageError, match=r"a latent of this VAE is B 4 T H W, not \(1, 3, 2, 2, 2\)"):
        any_vae.decode(latent[:, :3])
    with pytest.raises(UsageError, match=r"a video is B 3 T H W, not \(1, 4, 2, 2, 2\)"):
        any_vae.encode(latent)
    if any_vae.can_stream("encoder"):
        with pytest.raises(UsageError, match="no frames"):
            list(stream_encode(any_vae, []))


def test_gradients_are_those_of_the_whole_clip(any_vae: VideoVAE) -> None:
    latent = torch.randn(1, any_vae.latent_channels, 4, 1, 1, dtype=torch.float64, requires_grad=True)
    any_vae.decode_latent(latent).square().sum().backward()
    expected, latent.grad = latent.grad, None
    any_vae.decode(latent, chunk_frames=1).square().sum().backward()
    torch.testing.assert_close(latent.grad, expected, rtol=1e-10, atol=1e-10)


def test_a_stream_ends_with_the_frames_that_are_asked_for() -> None:
    vae = WFVAE(latent_channels=4, base_channels=4, encoder_flow_channels=4, decoder_flow_channels=4).eval()
    latent = torch.randn(1, 4, 3, 2, 2)
    with torch.no_grad():
        whole = torch.cat(list(stream_decode(vae, latent.split(1, 2))), 2)
        for frames in (1, 6, 9):
            pieces = list(stream_decode(vae, latent.split(1, 2), frames=frames))
            assert torch.equal(torch.cat(pieces, 2), whole[:, :, :frames])
        with pytest.raises(UsageError, match="frames=10: the latent holds 9"):
            list(stream_decode(vae, latent.split(1, 2), frames=10))
