"""Procedural clips: the same everywhere, true to their captions, and inside the frame."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from osp.data.procedural.drawing import RADIUS, render
from osp.data.procedural.scene import (
    BACKGROUND_COLOURS,
    BACKGROUND_TEXTURES,
    COLOURS,
    CONTRAST,
    MOTION_PHRASES,
    MOTIONS,
    OBJECT_TEXTURES,
    PALETTE,
    SHAPES,
    SIZES,
    Scene,
    SceneObject,
    backgrounds_for,
    caption,
    contrast,
    lab,
    scene_for,
)
from osp.data.sources import SyntheticClips
from osp.errors import UsageError

FROZEN_CAPTIONS = [
    "a small yellow diamond stays still in front of a pink striped background",
    "a striped orange ring grows larger in front of a blue background",
    "on an orange speckled background, a large white diamond grows larger",
    "a red triangle moves up",
]
FROZEN_MEAN, FROZEN_MOMENT = 141.541493, 34.364051


def coverage(video: Tensor) -> NDArray[np.float64]:
    """`T H W` part of each pixel that a black object on plain white covers."""
    grey = video.numpy().mean(axis=0)
    white, black = grey[:, 0, 0].max(), grey.min()
    return np.clip((white - grey) / (white - black), 0, 1)


def black_on_white(shape: str, motion: str, size: str = "medium", variation: int = 0) -> Scene:
    return Scene((SceneObject(shape, "black", motion, size),), background="white", variation=variation)


def centres(cover: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    area = cover.sum(axis=(1, 2))
    x = (cover.sum(axis=1) * (np.arange(cover.shape[2]) + 0.5)).sum(axis=1) / area
    y = (cover.sum(axis=2) * (np.arange(cover.shape[1]) + 0.5)).sum(axis=1) / area
    return x, y


def test_scenes_are_the_same_on_every_machine() -> None:
    """Frozen captions of the first clips: if this fails, old seeds no longer mean the same clips."""
    captions = [caption(scene_for(0, index)) for index in range(4)]
    assert captions == FROZEN_CAPTIONS


def test_pixels_are_the_same_on_every_machine() -> None:
    video = SyntheticClips(1, 5, 32, 48, seed=7).read(0, 0)["video"].double()
    weights = torch.linspace(-1, 1, video.numel(), dtype=torch.float64).reshape(video.shape)
    # Room for ten values rounded the other way by another processor's square root.
    assert video.mean().item() == pytest.approx(FROZEN_MEAN, abs=4e-4)
    assert (video * weights).mean().item() == pytest.approx(FROZEN_MOMENT, abs=4e-4)


def test_a_clip_depends_on_seed_and_index_only() -> None:
    clips = SyntheticClips(50, 5, 32, 32, seed=3)
    first = clips.read(4, 0)
    again = SyntheticClips(5, 5, 32, 32, seed=3).read(4, 99)
    assert torch.equal(first["video"], again["video"])
    assert first["caption"] == again["caption"]
    assert not torch.equal(first["video"], clips.read(5, 0)["video"])
    assert not torch.equal(first["video"], SyntheticClips(50, 5, 32, 32, seed=4).read(4, 0)["video"])


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 16, 16), (9, 33, 47), (2, 64, 36), (17, 24, 90)])
@pytest.mark.parametrize("objects", [1, 2])
def test_read_gives_what_a_source_gives(frames: int, height: int, width: int, objects: int) -> None:
    clips = SyntheticClips(12, frames, height, width, fps=12, objects=objects)
    keys = set()
    for index in range(len(clips)):
        sample = clips.read(index, 0)
        assert set(sample) == {"video", "caption", "key", "fps"}
        assert sample["video"].shape == (3, frames, height, width)
        assert sample["video"].dtype == torch.uint8
        assert sample["video"].is_contiguous()
        assert sample["fps"] == 12.0
        assert not set("./") & set(sample["key"])
        keys.add(sample["key"])
    assert len(keys) == 12


def test_fingerprint_follows_every_setting() -> None:
    settings = {"clips": 8, "frames": 9, "height": 32, "width": 48, "fps": 8.0, "seed": 0, "objects": None}
    changed = {"clips": 9, "frames": 17, "height": 48, "width": 32, "fps": 16.0, "seed": 1, "objects": 1}
    changed |= {"plain": True, "sizes": ["small"], "backgrounds": ["black", "white", "yellow", "blue"], "centred": True}
    prints = {SyntheticClips(**settings).fingerprint()}
    assert prints == {SyntheticClips(**settings).fingerprint()}
    for name, value in changed.items():
        prints.add(SyntheticClips(**{**settings, name: value}).fingerprint())
    assert len(prints) == 1 + len(changed)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"clips": 0}, "clips=0"),
        ({"frames": 0}, "frames=0"),
        ({"height": 15}, "height=15.*at least 16"),
        ({"width": 8}, "width=8"),
        ({"fps": 0.0}, "fps=0"),
        ({"fps": math.inf}, "fps=inf"),
        ({"objects": 3}, "objects=3"),
        ({"sizes": ["huge"]}, "unknown size 'huge': use one of small"),
        ({"sizes": ["large"]}, "sizes=.*large.* leave none for two objects: use objects=1"),
        ({"backgrounds": ["mauve"]}, "unknown background 'mauve'"),
        ({"backgrounds": ["black"], "objects": 1}, "none that black stands out from"),
        ({"backgrounds": ["black", "white"]}, "none that pink and black stand out from"),
    ],
)
def test_nonsense_settings_are_refused(setting: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SyntheticClips(**{"clips": 4, "frames": 5, "height": 32, "width": 32, **setting})


def test_a_simpler_world() -> None:
    chosen = {"objects": 1, "plain": True, "sizes": ["large"], "backgrounds": ["black", "white"], "centred": True}
    clips = SyntheticClips(64, 9, 32, 32, **chosen)
    scenes = [clips.scene(index) for index in range(64)]
    assert {scene.background for scene in scenes} == {"black", "white"}
    assert {(item.size, item.texture) for scene in scenes for item in scene.objects} == {("large", "plain")}
    assert all(scene.centred for scene in scenes)
    # What is not chosen stays what it is in the whole world.
    whole = SyntheticClips(64, 9, 32, 32, objects=1)
    same = [(item.shape, item.colour, item.motion) for scene in scenes for item in scene.objects]
    assert same == [(o.shape, o.colour, o.motion) for o in (whole.scene(index).objects[0] for index in range(64))]


@pytest.mark.parametrize("index", [-1, 4])
def test_no_clip_beyond_the_last(index: int) -> None:
    with pytest.raises(IndexError, match="of 4"):
        SyntheticClips(4, 5, 32, 32).read(index, 0)


def test_nonsense_scenes_are_refused() -> None:
    ball = SceneObject("circle", "red", "left")
    with pytest.raises(UsageError, match="unknown shape 'blob': use one of circle"):
        SceneObject("blob", "red", "left")
    with pytest.raises(UsageError, match="unknown colour 'grey'"):
        SceneObject("circle", "grey", "left")
    with pytest.raises(UsageError, match="red object does not stand out from a red background: use one of green"):
        Scene((ball,), background="red")
    with pytest.raises(UsageError, match="two colours"):
        Scene((ball, ball))
    with pytest.raises(UsageError, match="1 or 2 objects, not 0"):
        Scene(())
    with pytest.raises(UsageError, match="frames=0"):
        render(Scene((ball,)), 0, 32, 32)
    with pytest.raises(UsageError, match="8x32 is too small"):
        render(Scene((ball,)), 5, 8, 32)


def test_captions_name_colour_shape_and_motion() -> None:
    scenes = [scene_for(1, index) for index in range(500)]
    for scene in scenes:
        sentence = caption(scene)
        assert sentence == caption(scene)
        for item in scene.objects:
            assert f"{item.colour} {item.shape}" in sentence
            assert any(phrase in sentence for phrase in MOTION_PHRASES[item.motion])
        named = [word for word in sentence.replace(",", "").split() if word in SHAPES]
        assert sorted(named) == sorted(item.shape for item in scene.objects)
        if "background" in sentence:
            assert f"{scene.background} " in sentence
        assert "a orange" not in sentence
        assert "an red" not in sentence
    assert len({caption(scene) for scene in scenes}) > 480
    with_background = sum("background" in caption(scene) for scene in scenes)
    assert 300 < with_background < 450  # three wordings of four


def test_every_word_is_drawn_about_equally_often() -> None:
    scenes = [scene_for(2, index) for index in range(2000)]
    items = [item for scene in scenes for item in scene.objects]
    for words, drawn in (
        (SHAPES, [item.shape for item in items]),
        (COLOURS, [item.colour for item in items]),
        (MOTIONS, [item.motion for item in items]),
        (BACKGROUND_TEXTURES, [scene.texture for scene in scenes]),
    ):
        counts = Counter(drawn)
        fair = len(drawn) / len(words)
        assert set(counts) == set(words)
        assert all(0.75 * fair < count < 1.25 * fair for count in counts.values())
    assert {item.size for item in items} == set(SIZES)
    assert {item.texture for item in items} == set(OBJECT_TEXTURES)
    assert {scene.background for scene in scenes} == set(BACKGROUND_COLOURS)
    two = sum(len(scene.objects) == 2 for scene in scenes) / len(scenes)
    assert two == pytest.approx(0.2, abs=0.03)


def test_colours_stand_out() -> None:
    for colour in COLOURS:
        allowed = backgrounds_for([colour])
        assert len(allowed) >= 8
        assert colour not in allowed
        apart = [np.linalg.norm(lab(PALETTE[colour]) - lab(PALETTE[other])) for other in COLOURS if other != colour]
        assert min(apart) > 40
    for index in range(500):
        scene = scene_for(3, index)
        assert all(contrast(item.colour, scene.background) >= CONTRAST for item in scene.objects)
    # Every pair of colours has a background of its own.
    assert all(len(backgrounds_for([a, b])) >= 2 for a in COLOURS for b in COLOURS if a != b)


def test_lab_matches_published_values() -> None:
    """sRGB primaries in CIELAB under D65 (Lindbloom's tables)."""
    assert lab((255, 0, 0)) == pytest.approx((53.24, 80.09, 67.20), abs=0.05)
    assert lab((0, 0, 255)) == pytest.approx((32.30, 79.19, -107.86), abs=0.05)
    assert lab((255, 255, 255)) == pytest.approx((100.0, 0.0, 0.0), abs=0.05)


def test_few_frames_show_only_what_they_can() -> None:
    images, short = SyntheticClips(200, 1, 32, 32), SyntheticClips(200, 4, 32, 32)
    assert {item.motion for index in range(200) for item in images.scene(index).objects} == {"still"}
    drawn = {item.motion for index in range(200) for item in short.scene(index).objects}
    assert drawn == set(MOTIONS) - {"orbit"}


@pytest.mark.parametrize("frames", [2, 9, 33])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 96)])
@pytest.mark.parametrize("size", SIZES)
def test_motions_go_where_they_say(frames: int, height: int, width: int, size: str) -> None:
    side = min(height, width)
    for variation in range(4):
        for motion in ("left", "right", "up", "down", "still"):
            x, y = centres(coverage(render(black_on_white("circle", motion, size, variation), frames, height, width)))
            step_x, step_y = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}.get(motion, (0, 0))
            along = (x[-1] - x[0]) * step_x + (y[-1] - y[0]) * step_y
            across = abs((x[-1] - x[0]) * step_y) + abs((y[-1] - y[0]) * step_x)
            if motion == "still":
                assert max(np.ptp(x), np.ptp(y)) < 0.01
            else:
                assert along > 0.3 * side  # the same travel, however many frames
                assert across < 0.05
        for motion, ratio in (("grow", (1.35 / 0.65) ** 2), ("shrink", (0.65 / 1.35) ** 2)):
            cover = coverage(render(black_on_white("circle", motion, size, variation), frames, height, width))
            area = cover.sum(axis=(1, 2))
            assert area[-1] / area[0] == pytest.approx(ratio, rel=0.03)
            assert all(np.ptp(place) < 0.1 for place in centres(cover))


def test_a_centred_object_passes_the_middle() -> None:
    for variation, motion in enumerate(MOTIONS):
        scene = replace(black_on_white("circle", motion, "large", variation), centred=True)
        x, y = centres(coverage(render(scene, 9, 48, 96)))
        assert (x.mean(), y.mean()) == pytest.approx((48, 24), abs=0.1)
        # How far it moves is still the clip's own.
        free_x, free_y = centres(coverage(render(replace(scene, centred=False), 9, 48, 96)))
        np.testing.assert_allclose(x - x[0], free_x - free_x[0], atol=0.05)
        np.testing.assert_allclose(y - y[0], free_y - free_y[0], atol=0.05)


def test_an_orbit_is_one_full_turn() -> None:
    x, y = centres(coverage(render(black_on_white("star", "orbit", variation=5), 16, 64, 64)))
    angles = np.unwrap(np.arctan2(y - y.mean(), x - x.mean()))
    steps = np.diff(angles)
    assert np.abs(steps) == pytest.approx(np.full(15, 2 * math.pi / 16), abs=0.05)
    assert np.hypot(x - x.mean(), y - y.mean()).min() > 0.15 * 64


@pytest.mark.parametrize("size", SIZES)
def test_outlines_have_their_exact_area(size: str) -> None:
    """Anti-aliasing keeps the area to half a per cent (a radius is not whole pixels)."""
    radius = RADIUS[size] * 100
    exact = {
        "circle": math.pi * 0.92**2,
        "ring": math.pi * (0.93**2 - 0.51**2),
        "square": 1.6**2,
        "cross": 2 * 0.6 * 1.84 - 0.6**2,
        "diamond": 2 * 0.7,
        "triangle": 3 * math.sqrt(3) * 0.58**2,
        "star": 10 * 0.5 * 1.0 * 0.48 * math.sin(math.pi / 5),
    }
    assert set(exact) == set(SHAPES)
    for shape, area in exact.items():
        cover = coverage(render(black_on_white(shape, "still", size, variation=1), 1, 100, 100))
        assert cover.sum() == pytest.approx(area * radius**2, rel=0.02), shape


def test_objects_never_touch_the_edge() -> None:
    """The outermost pixels show the background, which does not move."""
    for index in range(300):
        height, width = [(64, 64), (32, 32), (40, 72), (72, 40)][index % 4]
        video = render(scene_for(5, index), 7, height, width).to(torch.int16)
        moved = (video - video[:, :1]).abs().amax(dim=(0, 1))
        assert moved[[0, -1]].max() == 0, index
        assert moved[:, [0, -1]].max() == 0, index


def test_two_objects_keep_apart() -> None:
    """Each object of a pair is drawn as if the other were not there, whatever the two do."""
    for first in MOTIONS:
        for second in MOTIONS:
            items = (SceneObject("square", "red", first, "large"), SceneObject("circle", "blue", second, "large"))
            video = render(Scene(items, background="white"), 6, 48, 48).float()
            red = (video[0] - video[2]).clamp(min=0) > 25
            blue = (video[2] - video[0]).clamp(min=0) > 25
            reach = torch.nn.functional.max_pool2d(red.float(), 3, stride=1, padding=1) > 0
            assert red.flatten(1).sum(dim=1).min() > 20
            assert blue.flatten(1).sum(dim=1).min() > 20
            assert not (reach & blue).any(), (first, second)


@pytest.mark.parametrize("texture", BACKGROUND_TEXTURES)
def test_textures_show_two_tones_of_one_colour(texture: str) -> None:
    scene = Scene((SceneObject("circle", "red", "still"),), background="green", texture=texture)
    video = render(scene, 2, 64, 64).double()
    border = torch.cat([video[:, 0, 0], video[:, 0, -1], video[:, 0, :, 0], video[:, 0, :, -1]], dim=1)
    spread = border.amax(dim=1) - border.amin(dim=1)
    if texture == "plain":
        assert spread.max() == 0
    else:
        assert spread[1] > 20
    # All of it still looks green.
    distances = np.stack([np.linalg.norm(lab(border.T.numpy()) - lab(PALETTE[name]), axis=1) for name in COLOURS])
    assert {COLOURS[name] for name in distances.argmin(axis=0)} == {"green"}
