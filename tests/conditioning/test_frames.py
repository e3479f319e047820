"""Frame masks, how they reach the latent, condition noise, and what a user may give."""

import itertools
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from osp.conditioning import (
    KINDS,
    MIXES,
    MODES,
    MaskMix,
    add_condition_noise,
    call_denoiser,
    find_mix,
    frame_mask,
    given_by_mode,
    given_frames,
    latent_mask,
    masked_video,
    spread,
    with_conditions,
)
from osp.denoiser import CrossTransformer, Stage
from osp.errors import UsageError


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100000 * seed + i) for i in range(count)]


def kept(mask: Tensor) -> list[int]:
    assert ((mask == 0) | (mask == 1)).all()
    return (mask == 0).nonzero().flatten().tolist()


# --- masks ---


@pytest.mark.parametrize("frames", [3, 5, 33])
def test_kinds_that_leave_nothing_open(frames: int) -> None:
    expected = {"text": [], "clear": [*range(frames)], "first": [0], "transition": [0, frames - 1]}
    for kind, numbers in expected.items():
        mask = frame_mask(kind, frames, *generators(1))
        assert mask.shape == (frames,)
        assert kept(mask) == numbers


@pytest.mark.parametrize(("frames", "share"), [(2, 0.0), (5, 0.0), (5, 0.5), (8, 0.25), (9, 0.125), (2, 0.9)])
def test_all_that_kinds_with_a_draw_may_give_they_give(frames: int, share: float) -> None:
    least = min(frames - 1, max(1, math.ceil(share * frames)))
    counts = range(least, frames)
    continued = {tuple(range(count)) for count in counts}
    drawn = Counter(tuple(kept(frame_mask("continuation", frames, g, share))) for g in generators(600))
    assert set(drawn) == continued
    assert min(drawn.values()) > 0.5 * 600 / len(continued)
    drawn = Counter(tuple(kept(frame_mask("random", frames, g, share))) for g in generators(2000))
    possible = {some for count in counts for some in itertools.combinations(range(frames), count)}
    assert set(drawn) <= possible
    assert {len(some) for some in drawn} == set(counts)
    if frames <= 5:
        assert set(drawn) == possible


def test_impossible_masks() -> None:
    (generator,) = generators(1)
    with pytest.raises(UsageError, match="masks: kind=last: is not known"):
        frame_mask("last", 5, generator)
    for kind, frames in (("first", 1), ("transition", 2), ("continuation", 1), ("random", 1)):
        with pytest.raises(UsageError, match=f"frame mask '{kind}' needs {frames + 1} frames, the clip has {frames}"):
            frame_mask(kind, frames, generator)


@pytest.mark.parametrize("name", MIXES)
def test_mixtures_are_drawn_as_they_say(name: str) -> None:
    mix, samples = find_mix(name), 4000
    masks, kinds = mix.draw(9, generators(samples))
    assert masks.shape == (samples, 9)
    counts = Counter(kinds)
    total = sum(mix.weights.values())
    for kind in KINDS:
        share = mix.weights.get(kind, 0) / total
        assert abs(counts[kind] / samples - share) <= 4 * math.sqrt(share * (1 - share) / samples), kind
    least = max(1, math.ceil(mix.least_kept * 9))
    for mask, kind in zip(masks, kinds, strict=True):
        numbers = kept(mask)
        if kind in ("continuation", "random"):
            assert least <= len(numbers) < 9
        if kind == "continuation":
            assert numbers == [*range(len(numbers))]


def test_published_numbers() -> None:
    assert [MIXES[f"step{i}"].least_kept for i in range(1, 8)] == [0.5, 0.25, 0.125, 0.125, 0, 0, 0]
    assert all(sum(MIXES[f"step{i}"].weights.values()) == 100 for i in range(1, 8))
    assert MIXES["shipped"].weights == {"text": 1, "first": 8, "transition": 8, "continuation": 2, "random": 1}


def test_a_mask_is_its_samples_own() -> None:
    mix = find_mix("step6")
    masks, kinds = mix.draw(17, generators(40))
    again, same = mix.draw(17, generators(40)[25:])
    assert torch.equal(masks[25:], again)
    assert kinds[25:] == same
    assert not torch.equal(masks, mix.draw(17, generators(40, seed=1))[0])


def test_short_clips_get_the_kinds_that_they_can_have() -> None:
    assert set(find_mix("step6").draw(1, generators(50))[1]) == {"text"}
    kinds = Counter(find_mix("step1").draw(1, generators(400))[1])
    assert set(kinds) == {"text", "clear"}
    assert 150 < kinds["text"] < 250
    assert set(find_mix("step7").draw(2, generators(300))[1]) == {"text", "continuation", "random", "first"}
    assert MaskMix({"transition": 1}).draw(2, generators(3))[1] == ["text"] * 3
    assert set(MaskMix({"first": 1, "text": 0}).draw(3, generators(50))[1]) == {"first"}


def test_impossible_mixtures() -> None:
    assert find_mix({"first": 2.0}).weights == {"first": 2.0}
    with pytest.raises(UsageError, match="masks=step9: is not known; choose step1"):
        find_mix("step9")
    with pytest.raises(UsageError, match="kind=middle: is not known"):
        find_mix({"middle": 1})
    for weights in ({}, {"first": -1, "text": 2}, {"first": 0}, {"first": math.inf}, {"first": math.nan}):
        with pytest.raises(UsageError, match="must not be negative"):
            MaskMix(weights)
    with pytest.raises(UsageError, match="least_kept=1"):
        MaskMix({"random": 1}, least_kept=1)


# --- latent ---


@pytest.mark.parametrize("stride", [4, 8])
@pytest.mark.parametrize("frames", [1, 5, 9, 33])
def test_each_latent_frame_has_the_masks_of_its_frames(frames: int, stride: int) -> None:
    torch.manual_seed(frames)
    mask = torch.randint(0, 2, (2, frames)).float()
    found = latent_mask(spread(mask, 16, 24), stride, 2, 3)
    length = 1 + math.ceil((frames - 1) / stride)
    assert found.shape == (2, stride, length, 2, 3)
    for sample, t, channel in itertools.product(range(2), range(length), range(stride)):
        frame = 0 if t == 0 else min(frames - 1, 1 + (t - 1) * stride + channel)
        assert (found[sample, channel, t] == mask[sample, frame]).all(), (t, channel)


def test_masks_of_kept_frames_by_hand() -> None:
    # Nine frames of which the first two are kept, stride 4: [0 0 0 0] [0 1 1 1] [1 1 1 1]
    mask = torch.ones(1, 9)
    mask[:, :2] = 0
    found = latent_mask(spread(mask, 8, 8), 4, 1, 1)[0, :, :, 0, 0].T
    assert found.tolist() == [[0, 0, 0, 0], [0, 1, 1, 1], [1, 1, 1, 1]]
    # First and last, stride 8
    mask = torch.ones(1, 9)
    mask[:, [0, 8]] = 0
    found = latent_mask(spread(mask, 8, 8), 8, 1, 1)[0, :, :, 0, 0].T
    assert found.tolist() == [[0] * 8, [1] * 7 + [0]]


def test_masks_in_the_order_of_v12_by_hand() -> None:
    # Nine frames of which first and last are kept: the first one three times more, cut into four channels in turn.
    mask = torch.ones(1, 9)
    mask[:, [0, 8]] = 0
    found = latent_mask(spread(mask, 8, 8), 4, 1, 1, "v12")[0, :, :, 0, 0]
    assert found.tolist() == [[0, 0, 0], [0, 1, 1], [1, 1, 1], [1, 1, 0]]


def test_both_orders_hold_the_same_frames() -> None:
    torch.manual_seed(0)
    mask = spread(torch.randint(0, 2, (2, 11)).float(), 16, 16)
    by_frame, by_channel = latent_mask(mask, 4, 2, 2), latent_mask(mask, 4, 2, 2, "v12")
    assert torch.equal(by_frame.transpose(1, 2).flatten(1, 2), by_channel.flatten(1, 2))


def test_parts_of_frames_are_scaled_bilinearly() -> None:
    torch.manual_seed(0)
    mask = torch.randint(0, 2, (2, 5, 16, 24)).float()
    found = latent_mask(mask, 4, 2, 3)
    # At a scale of 1/8 the middle of a latent pixel lies between four pixels
    expected = mask.unflatten(3, (3, 8)).unflatten(2, (2, 8))[:, :, :, 3:5, :, 3:5].mean(dim=(3, 5))
    torch.testing.assert_close(found[:, :, 1], expected[:, 1:])
    torch.testing.assert_close(found[:, :, 0], expected[:, :1].expand(-1, 4, -1, -1))
    torch.testing.assert_close(found[:, 0, 0], F.interpolate(mask[:, :1], (2, 3), mode="bilinear")[:, 0])
    assert torch.equal(latent_mask(mask.bool(), 4, 2, 3), found)
    with pytest.raises(UsageError, match="B T H W"):
        latent_mask(mask[:, 0], 4, 2, 3)


def test_the_masked_video_is_grey_where_it_is_to_be_generated() -> None:
    torch.manual_seed(0)
    video = torch.rand(2, 3, 5, 4, 6) * 2 - 1
    mask = torch.randint(0, 2, (2, 5, 4, 6)).float()
    masked = masked_video(video, mask)
    for place in itertools.product(range(2), range(5), range(4), range(6)):
        sample, *where = place
        expected = video[sample, :, *where] if mask[place] == 0 else torch.zeros(3)
        assert torch.equal(masked[sample, :, *where], expected)
    with pytest.raises(UsageError, match="the mask has the shape"):
        masked_video(video, mask[:, :4])


def test_the_input_of_the_inpainting_model() -> None:
    torch.manual_seed(0)
    noisy, masked = torch.randn(2, 8, 3, 4, 4), torch.randn(2, 8, 3, 4, 4)
    mask = latent_mask(spread(find_mix("step6").draw(9, generators(2))[0], 32, 32), 4, 4, 4)
    beside = torch.cat((masked, mask), dim=1)
    model_input = with_conditions(noisy, beside)
    assert torch.equal(model_input, torch.cat((noisy, masked, mask), dim=1))
    model = CrossTransformer([Stage(1)], frame_channels=(8, 4), heads=2, head_dim=12, text_channels=16)
    assert model(model_input, torch.zeros(2), torch.zeros(2, 1, 16)).shape == noisy.shape
    text = torch.zeros(2, 1, 16)
    assert call_denoiser(model, noisy, torch.zeros(2), beside=beside, text=text).shape == noisy.shape
    with pytest.raises(UsageError, match="takes 20 channels, and the latent with its conditions has 16"):
        call_denoiser(model, noisy, torch.zeros(2), beside=beside[:, 4:], text=text)
    with pytest.raises(UsageError, match="the conditions have the shape"):
        with_conditions(noisy, beside[:, :, :2])


# --- noise ---


def test_condition_noise_is_on_kept_frames_only_and_the_samples_own() -> None:
    video = torch.zeros(3, 3, 5, 8, 8)
    mask = spread(torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 1, 1, 0.0]]), 8, 8)
    noisy = add_condition_noise(video, mask, generators(3))
    changed = (noisy != 0).flatten(3).any(dim=3).any(dim=1)
    assert torch.equal(changed, mask[:, :, 0, 0] == 0)
    assert torch.equal(noisy[2:], add_condition_noise(video[2:], mask[2:], generators(3)[2:]))
    assert (video == 0).all()
    half = add_condition_noise(video.bfloat16(), mask, generators(3))
    assert half.dtype == torch.bfloat16
    with pytest.raises(UsageError, match="the mask has the shape"):
        add_condition_noise(video, mask[:2], generators(3))


def test_condition_noise_is_as_strong_as_published() -> None:
    video = torch.zeros(1000, 1, 1, 20, 20)
    noisy = add_condition_noise(video, torch.zeros(1000, 1, 20, 20), generators(1000))
    logarithms = noisy.flatten(1).std(dim=1).log()
    assert abs(logarithms.mean() + 3.0) < 0.06
    assert abs(logarithms.std() - 0.5) < 0.04
    still = add_condition_noise(video[:2], torch.zeros(2, 1, 20, 20), generators(2), mean=-math.inf, std=0.0)
    assert (still == 0).all()


# --- what a user gives ---


def pictures(count: int) -> list[Tensor]:
    return [torch.full((3, 4, 6), 0.1 * (i + 1)) for i in range(count)]


@pytest.mark.parametrize(
    ("mode", "count", "numbers"),
    [("text", 0, []), ("image", 1, [0]), ("transition", 2, [0, 8]), ("continuation", 3, [0, 1, 2])],
)
def test_modes(mode: str, count: int, numbers: list[int]) -> None:
    assert mode in MODES
    given = given_by_mode(mode, pictures(count), 9, 4, 6)
    assert given.mask.shape == (1, 9, 4, 6)
    assert given.video.shape == (1, 3, 9, 4, 6)
    for pixel in given.mask[0].flatten(1).T:
        assert kept(pixel) == numbers
    for number, picture in zip(numbers, pictures(count), strict=True):
        assert torch.equal(given.video[0, :, number], picture)
    assert torch.equal(masked_video(given.video, given.mask), given.video)
    assert latent_mask(given.mask, 4, 1, 1).shape == (1, 4, 3, 1, 1)


def test_any_frames() -> None:
    first, second = pictures(2)
    given = given_frames({-1: first, 3: second}, 6, 4, 6)
    assert kept(given.mask[0, :, 0, 0]) == [3, 5]
    assert torch.equal(given.video[0, :, 5], first)
    assert torch.equal(given.video[0, :, 3], second)


@pytest.mark.parametrize(
    ("numbers", "frames", "size", "message"),
    [
        ([9], 9, (4, 6), "frame 9 is given, but the video's 9 frames are 0 to 8"),
        ([-10], 9, (4, 6), "frame -10 is given"),
        ([8, -1], 9, (4, 6), "frame 8 is given twice"),
        ([0], 9, (6, 4), r"the picture for frame 0 is \(3, 4, 6\) of float32; it must be \(3, 6, 4\), floating"),
        ([0, 1], 2, (4, 6), "all 2 frames are given"),
        ([0], 1, (4, 6), "all 1 frames are given"),
    ],
)
def test_impossible_frames(numbers: list[int], frames: int, size: tuple[int, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        given_frames(dict(zip(numbers, pictures(len(numbers)), strict=True)), frames, *size)


@pytest.mark.parametrize(
    ("mode", "count", "frames", "message"),
    [
        ("last", 1, 9, "mode=last: is not known; choose text, image, transition or continuation"),
        ("text", 1, 9, "mode=text takes no picture; 1 given"),
        ("image", 0, 9, "mode=image takes one picture"),
        ("image", 2, 9, "mode=image takes one picture"),
        ("transition", 1, 9, "mode=transition takes two pictures"),
        ("transition", 2, 1, "frames=1 is too short"),
        ("continuation", 0, 9, "mode=continuation takes the first frames"),
        ("continuation", 9, 9, "all 9 frames are given"),
        ("continuation", 10, 9, "frame 9 is given, but the video's 9 frames"),
    ],
)
def test_impossible_modes(mode: str, count: int, frames: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        given_by_mode(mode, pictures(count), frames, 4, 6)


def test_pictures_are_floating() -> None:
    with pytest.raises(UsageError, match="of uint8"):
        given_frames({0: torch.zeros(3, 4, 6, dtype=torch.uint8)}, 5, 4, 6)
    with pytest.raises(UsageError, match="frames=0"):
        given_frames({}, 0, 4, 6)
