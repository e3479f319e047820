"""The oracle agrees with the truth of clean clips, less so as they get worse, and says so when there is nothing."""

from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest
import torch
from scipy import ndimage
from torch import Tensor

from osp.data.procedural.drawing import render
from osp.data.procedural.oracle import UNKNOWN, Reading, read, read_objects
from osp.data.procedural.scene import Scene, SceneObject
from osp.data.sources import SyntheticClips
from osp.errors import UsageError


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Clips this small are slower on many threads, and much slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def agreement(clips: SyntheticClips, change: Callable[[Tensor, int], Tensor] = lambda video, index: video) -> float:
    """Part of the one-object clips whose colour, shape and motion are all read right."""
    right = 0
    for index in range(len(clips)):
        truth = clips.scene(index).objects[0]
        seen = read(change(clips.read(index, 0)["video"], index))
        right += seen == Reading(truth.colour, truth.shape, truth.motion)
    return right / len(clips)


def noisy(video: Tensor, index: int, sigma: float) -> Tensor:
    """Gaussian noise of `sigma` in grey levels."""
    noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(index))
    return (video + sigma * noise).round().clamp(0, 255).to(torch.uint8)


def blurred(video: Tensor, index: int, radius: float, sigma: float) -> Tensor:
    smooth = ndimage.gaussian_filter(video.numpy().astype("float32"), (0, 0, radius, radius))
    return noisy(torch.from_numpy(smooth), index, sigma)


def test_agrees_on_a_thousand_clips() -> None:
    assert agreement(SyntheticClips(1000, 17, 64, 64, objects=1)) >= 0.99


@pytest.mark.parametrize(
    ("clips", "frames", "height", "width", "least"),
    [
        (200, 9, 64, 64, 0.99),
        (40, 33, 128, 128, 0.99),
        (100, 5, 48, 80, 0.98),
        (300, 17, 32, 32, 0.98),
        (100, 1, 64, 64, 0.98),
    ],
)
def test_agrees_at_other_lengths_and_sizes(clips: int, frames: int, height: int, width: int, least: float) -> None:
    assert agreement(SyntheticClips(clips, frames, height, width, seed=1, objects=1)) >= least


def test_gets_worse_with_noise() -> None:
    clips = SyntheticClips(80, 9, 64, 64, seed=2, objects=1)
    levels = (0.0, 10.0, 20.0, 40.0, 60.0, 120.0)
    scores = [agreement(clips, lambda video, index, sigma=sigma: noisy(video, index, sigma)) for sigma in levels]
    assert scores[0] >= 0.98
    assert scores[1] >= 0.95
    assert all(later <= earlier + 0.02 for earlier, later in pairwise(scores)), scores
    assert scores[2] > scores[3] + 0.1 > scores[4] + 0.2
    assert scores[-1] <= 0.05


def test_bears_a_light_blur_and_a_little_noise() -> None:
    clips = SyntheticClips(200, 17, 64, 64, seed=3, objects=1)
    assert agreement(clips, lambda video, index: blurred(video, index, radius=1.0, sigma=5.0)) > 0.97
    small = SyntheticClips(200, 17, 32, 32, seed=3, objects=1)
    assert agreement(small, lambda video, index: blurred(video, index, radius=0.7, sigma=3.0)) > 0.9


def test_reads_models_range_like_bytes() -> None:
    clips = SyntheticClips(20, 9, 64, 64, seed=4, objects=1)
    for index in range(len(clips)):
        video = clips.read(index, 0)["video"]
        scaled = video.float() / 127.5 - 1
        assert read(scaled) == read(video)
        assert read(scaled.to(torch.bfloat16)) == read(video)


def test_motion_is_told_by_the_order_of_frames() -> None:
    """Nothing but the order differs, so this cannot be right for a wrong reason."""
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up", "grow": "shrink", "shrink": "grow"}
    for motion, other in {**opposite, "orbit": "orbit", "still": "still"}.items():
        video = render(Scene((SceneObject("star", "yellow", motion),), "blue", "striped"), 9, 64, 64)
        assert read(video) == Reading("yellow", "star", motion)
        assert read(video.flip(1)) == Reading("yellow", "star", other)
        assert read(video[:, :1].expand(-1, 9, -1, -1)).motion == "still"


def test_a_swapped_channel_changes_the_colour_only() -> None:
    video = render(Scene((SceneObject("cross", "red", "up"),), "black"), 9, 64, 64)
    assert read(video) == Reading("red", "cross", "up")
    assert read(video.flip(0)) == Reading("blue", "cross", "up")


def test_two_objects() -> None:
    clips = SyntheticClips(100, 17, 64, 64, seed=5, objects=2)
    right = 0
    for index in range(len(clips)):
        truth = {Reading(item.colour, item.shape, item.motion) for item in clips.scene(index).objects}
        right += set(read_objects(clips.read(index, 0)["video"])) == truth
    assert right >= 95


def test_says_so_when_there_is_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    assert read(torch.randint(0, 256, (3, 17, 64, 64), generator=generator, dtype=torch.uint8)) == UNKNOWN
    assert read(torch.randn(3, 9, 32, 32, generator=generator)) == UNKNOWN
    assert read(torch.zeros(3, 17, 64, 64)) == UNKNOWN
    assert read(torch.full((3, 1, 16, 16), float("nan"))) == UNKNOWN
    gradient = torch.linspace(-1, 1, 64).expand(3, 9, 64, 64)
    assert read(gradient) == UNKNOWN
    assert read_objects(torch.zeros(3, 17, 64, 64)) == []


def test_an_unknown_outline_has_no_shape() -> None:
    video = torch.full((3, 5, 64, 64), -1.0)
    video[0, :, 30:34, 8:56] = 0.7  # a thin red bar
    assert read(video) == Reading("red", None, "still")


def test_refuses_what_is_no_clip() -> None:
    with pytest.raises(UsageError, match=r"not shape \(1, 3, 9, 64, 64\)"):
        read(torch.zeros(1, 3, 9, 64, 64))
    with pytest.raises(UsageError, match="C = 3"):
        read(torch.zeros(1, 9, 64, 64))
    with pytest.raises(UsageError, match="objects=0"):
        read_objects(torch.zeros(3, 9, 64, 64), objects=0)
