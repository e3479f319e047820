"""Per-clip metrics against closed forms and against torchmetrics called frame by frame."""

import math

import pytest
import torch
from torch import Tensor
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    structural_similarity_index_measure,
)

from osp.errors import UsageError
from osp.evaluation import metrics
from osp.evaluation.metrics import clip_metrics, flicker, ms_ssim_scales, psnr


def noisy_clip(frames: int, side: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    video = torch.rand(3, frames, side, side, generator=generator) * 1.6 - 0.8
    return video, (video + 0.1 * torch.randn(video.shape, generator=generator)).clamp(-1, 1)


@pytest.mark.parametrize("offset", [0.02, 0.2, 1.0])
def test_psnr_of_a_constant_offset(offset: float) -> None:
    video = torch.full((3, 4, 16, 16), -0.4)
    expected = -20 * math.log10(offset / 2)  # [-1, 1] has range 2
    assert psnr(video + offset, video).item() == pytest.approx(expected, abs=1e-3)


def test_psnr_is_of_the_whole_clip_and_not_a_mean_over_frames() -> None:
    video = torch.zeros(3, 2, 16, 16)
    reconstruction = video.clone()
    reconstruction[:, 1] = 0.2
    assert psnr(reconstruction, video).item() == pytest.approx(20 + 10 * math.log10(2), abs=1e-3)


def test_equal_clips() -> None:
    video, _ = noisy_clip(3, 48)
    values = clip_metrics(video, video.clone())
    assert values["psnr"] == 100.0
    assert values["ssim"] == pytest.approx(1.0, abs=1e-6)
    assert values["ms_ssim_3scale"] == pytest.approx(1.0, abs=1e-6)
    assert values["flicker"] == 0.0


def test_ssim_of_two_constants_is_their_luminance_term() -> None:
    a, b = 0.3, 0.6  # in [0, 1]
    values = clip_metrics(torch.full((3, 2, 32, 32), 2 * a - 1), torch.full((3, 2, 32, 32), 2 * b - 1))
    expected = (2 * a * b + 0.01**2) / (a**2 + b**2 + 0.01**2)
    assert values["ssim"] == pytest.approx(expected, abs=5e-4)  # float32 against (0.03)^2


def test_ssim_is_the_mean_over_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    video, reconstruction = noisy_clip(5, 32)
    pairs = [((reconstruction[None, :, i] + 1) / 2, (video[None, :, i] + 1) / 2) for i in range(5)]
    expected = sum(structural_similarity_index_measure(a, b, data_range=1.0).item() for a, b in pairs) / 5
    whole = clip_metrics(reconstruction, video)
    monkeypatch.setattr(metrics, "PIXELS_AT_ONCE", 2 * 32 * 32)  # two frames at a time
    assert whole["ssim"] == pytest.approx(expected, abs=1e-6)
    assert clip_metrics(reconstruction, video) == pytest.approx(whole, abs=1e-6)


def test_ms_ssim_with_five_scales_is_the_published_one() -> None:
    video, reconstruction = noisy_clip(2, 176)
    frames = [(x.transpose(0, 1) + 1) / 2 for x in (reconstruction, video)]
    expected = multiscale_structural_similarity_index_measure(*frames, data_range=1.0).item()
    values = clip_metrics(reconstruction, video)
    assert values["ms_ssim"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("side", "scales"), [(256, 5), (176, 5), (175, 4), (99, 4), (98, 3), (44, 3), (43, 2), (22, 2), (21, 0)]
)
def test_ms_ssim_says_how_many_scales_it_has(side: int, scales: int) -> None:
    assert ms_ssim_scales(side, 300) == ms_ssim_scales(300, side) == scales
    video, reconstruction = noisy_clip(1, side)
    keys = [key for key in clip_metrics(reconstruction, video) if key.startswith("ms_ssim")]
    assert keys == ([] if not scales else ["ms_ssim"] if scales == 5 else [f"ms_ssim_{scales}scale"])


def test_flicker_of_an_alternating_error_on_a_static_clip() -> None:
    video = torch.zeros(3, 6, 8, 8)
    sign = torch.tensor([1.0, -1.0]).repeat(3).view(1, 6, 1, 1)
    value = flicker(video + 0.1 * sign, video)
    assert value is not None
    assert value.item() == pytest.approx(0.2 * 127.5, rel=1e-5)


def test_flicker_sees_no_constant_error_and_no_motion_of_the_input() -> None:
    video, _ = noisy_clip(4, 16)
    value = flicker(video * 0.5 + 0.1, video * 0.5)
    assert value is not None
    assert value.item() == pytest.approx(0.0, abs=1e-4)


def test_a_single_small_frame_has_neither_flicker_nor_ssim() -> None:
    video, reconstruction = noisy_clip(1, 8)
    values = clip_metrics(reconstruction, video)
    assert values["flicker"] is None
    assert values["ssim"] is None
    assert list(values) == ["psnr", "ssim", "flicker"]


def test_a_metric_of_ones_own_stands_beside_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_REGISTERED", {})
    metrics.register_metric("largest_error", largest_error)
    metrics.register_metric("largest_error", largest_error)
    video = torch.zeros(3, 2, 16, 16)
    found = clip_metrics(video + 0.25, video)
    assert list(found) == ["psnr", "ssim", "flicker", "largest_error"]
    assert found["largest_error"] == 0.25
    for name in ("psnr", "largest_error"):
        with pytest.raises(UsageError, match=f"there is another metric {name}"):
            metrics.register_metric(name, lambda a, b: 0)
    with pytest.raises(UsageError, match="must be letters"):
        metrics.register_metric("a b", largest_error)
    metrics.register_metric("broken", lambda a, b: a)
    with pytest.raises(
        UsageError, match=r"metric broken gives values of shape \(3, 2, 16, 16\); it must give one finite number"
    ):
        clip_metrics(video, video)


def largest_error(reconstruction: torch.Tensor, video: torch.Tensor) -> torch.Tensor:
    return (reconstruction - video).abs().max()
