"""Procedural captioned clips: moving shapes whose caption is the exact truth, drawn in milliseconds, with no files.

Every clip follows from (seed, index) alone. Lengths below are in units of the frame's shorter side unless they end in
`_px`; x points right and y points down.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from osp.data.procedural.scene import (
    BACKGROUND_TONE,
    MOTIONS,
    OBJECT_TONE,
    PALETTE,
    Draws,
    Scene,
    SceneObject,
    second_tone,
)
from osp.errors import UsageError

Array = NDArray[np.float32]

MIN_SIDE = 16
# With fewer frames the turn of an orbit cannot be told from a jump.
MIN_ORBIT_FRAMES = 5
# Part of the fingerprint: raise it whenever the same (seed, index) gives other pixels or another caption.
DRAWING_VERSION = 1

RADIUS = {"small": 0.145, "medium": 0.19, "large": 0.25}
# Radius at the first and last frame of a clip, relative to the object's own.
GROWTH = {"grow": (0.65, 1.35), "shrink": (1.35, 0.65)}
DIRECTION = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
# No object comes nearer to the edge of the frame than this.
MARGIN = 0.045


def shape_distance(shape: str, x: Array, y: Array) -> Array:
    """Signed distance of points (x, y) to the outline of `shape` of radius 1, negative inside.

    Exact near the outline's straight and round parts, which is all that anti-aliasing needs. Distance functions after
    Inigo Quilez, "2D distance functions".
    """
    match shape:
        case "circle":
            return np.hypot(x, y) - np.float32(0.92)
        case "ring":
            return np.abs(np.hypot(x, y) - np.float32(0.72)) - np.float32(0.21)
        case "square":
            return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.8)
        case "cross":
            across, along = np.minimum(np.abs(x), np.abs(y)), np.maximum(np.abs(x), np.abs(y))
            return np.maximum(across - np.float32(0.3), along - np.float32(0.92))
        case "diamond":
            return (np.abs(x) + np.float32(0.7) * np.abs(y) - np.float32(0.7)) / np.float32(math.hypot(1.0, 0.7))
        case "triangle":
            y = y - np.float32(0.2)
            slanted = np.float32(math.sqrt(0.75)) * np.abs(x) - np.float32(0.5) * y
            return np.maximum(slanted, y) - np.float32(0.58)
        case "star":
            return _star_distance(x, y)
    raise UsageError(f"unknown shape {shape!r}")


def _star_distance(x: Array, y: Array) -> Array:
    """Five-pointed star: the plane is folded onto one half of one point, which is a line segment."""
    cos, sin = np.float32(math.cos(math.pi / 5)), np.float32(math.sin(math.pi / 5))
    x, y = np.abs(x), -y
    fold: Array = 2 * np.maximum(cos * x - sin * y, 0)
    x, y = x - fold * cos, y + fold * sin
    fold = 2 * np.maximum(-cos * x - sin * y, 0)
    x, y = np.abs(x + fold * cos), y + fold * sin - 1
    inner = np.float32(0.48)
    side_x, side_y = inner * sin, inner * cos - 1
    along = np.clip((x * side_x + y * side_y) / (side_x**2 + side_y**2), 0, 1)
    return np.hypot(x - side_x * along, y - side_y * along) * np.sign(y * side_x - x * side_y)


def _wave(position_px: Array, period_px: float) -> Array:
    """Square wave in 0..1, half of each period 1, its edges one pixel wide."""
    offset = np.abs(np.mod(position_px, np.float32(period_px)) - np.float32(period_px / 2))
    return np.clip(np.float32(period_px / 4 + 0.5) - offset, 0, 1)


def _speckle(x: NDArray[np.int64], y: NDArray[np.int64], seed: int) -> Array:
    """A random value in [0, 1) for each cell (x, y), by integer hashing (the finaliser of MurmurHash3)."""
    value = (x * 0x9E3779B1 + y * 0x85EBCA77 + seed).astype(np.uint32)
    for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        value = (value ^ (value >> np.uint32(shift))) * np.uint32(factor)
    return ((value ^ (value >> np.uint32(16))) >> np.uint32(8)).astype(np.float32) / np.float32(1 << 24)


def _texture(texture: str, x_px: Array, y_px: Array, period_px: float, draws: Draws, name: str) -> Array:
    """How much of the second tone each pixel takes, 0..1."""
    x_px = x_px + np.float32(draws.uniform(f"{name} texture x", 0.0, period_px))
    y_px = y_px + np.float32(draws.uniform(f"{name} texture y", 0.0, period_px))
    match texture:
        case "striped":
            across_x, across_y = draws.pick(
                f"{name} stripes", ((1.0, 0.0), (0.0, 1.0), (0.7071, 0.7071), (0.7071, -0.7071))
            )
            return _wave(x_px * np.float32(across_x) + y_px * np.float32(across_y), period_px)
        case "checked":
            columns, rows = _wave(x_px, 1.6 * period_px), _wave(y_px, 1.6 * period_px)
            return columns + rows - 2 * columns * rows
        case "dotted":
            column = np.mod(x_px, np.float32(period_px)) - np.float32(period_px / 2)
            row = np.mod(y_px, np.float32(period_px)) - np.float32(period_px / 2)
            return np.clip(np.float32(0.3 * period_px + 0.5) - np.hypot(column, row), 0, 1)
        case "speckled":
            cell = max(1.0, 0.25 * period_px)
            cells = np.floor(x_px / cell).astype(np.int64), np.floor(y_px / cell).astype(np.int64)
            return _speckle(*cells, seed=draws.integer(f"{name} speckle") >> 34)
    return np.zeros(np.broadcast_shapes(x_px.shape, y_px.shape), dtype=np.float32)


def _tones(colour: str, amount: float, draws: Draws, name: str) -> tuple[Array, Array]:
    """Both tones of a texture, sRGB 0..255, with a slight tint of this clip's own."""
    tint = [draws.uniform(f"{name} tint {channel}", -8.0, 8.0) for channel in range(3)]
    first = np.clip(np.array(PALETTE[colour], dtype=np.float64) + tint, 0.0, 255.0)
    return first.astype(np.float32), second_tone(first, amount).astype(np.float32)


def _background(scene: Scene, height: int, width: int, draws: Draws) -> Array:
    """`H W C` in 0..255."""
    y_px, x_px = np.mgrid[0.5:height, 0.5:width].astype(np.float32)
    if scene.texture == "gradient":
        angle = draws.uniform("gradient", 0.0, 2 * math.pi)
        along = (x_px / width - 0.5) * np.float32(math.cos(angle)) + (y_px / height - 0.5) * np.float32(math.sin(angle))
        mix = (along - along.min()) / (along.max() - along.min())
    else:
        mix = _texture(scene.texture, x_px, y_px, max(4.0, min(height, width) / 8), draws, "background")
    first, second = _tones(scene.background, BACKGROUND_TONE, draws, "background")
    return first + mix[..., None] * (second - first)


@dataclass(frozen=True)
class _Box:
    """The part of the frame that one object keeps to."""

    x: float
    y: float
    half_width: float
    half_height: float


def _boxes(scene: Scene, height: int, width: int) -> list[_Box]:
    """The whole frame for one object; a half each for two, cut so that their motions have room."""
    unit = min(height, width)
    half_width, half_height = width / unit / 2, height / unit / 2
    if len(scene.objects) == 1:
        return [_Box(half_width, half_height, half_width, half_height)]
    directions = [DIRECTION.get(item.motion, (0, 0)) for item in scene.objects]
    horizontal, vertical = sum(abs(x) for x, _ in directions), sum(abs(y) for _, y in directions)
    if horizontal > vertical or (horizontal == vertical and height > width):
        return [_Box(half_width, half_height * part, half_width, half_height / 2) for part in (0.5, 1.5)]
    return [_Box(half_width * part, half_height, half_width / 2, half_height) for part in (0.5, 1.5)]


def _path(
    item: SceneObject, box: _Box, frames: int, draws: Draws, name: str, centred: bool
) -> tuple[Array, Array, Array]:
    """Centre x, centre y and radius of an object in each frame: three arrays of T."""
    # Progress 0..1; a single frame shows the middle of the motion.
    time = np.linspace(0.0, 1.0, frames) if frames > 1 else np.array([0.5])
    narrow = min(box.half_width, box.half_height)
    first, last = GROWTH.get(item.motion, (1.0, 1.0))
    radius = min(RADIUS[item.size] * math.sqrt(2 * narrow), 0.5 * narrow)
    # Room to move to each side of the box's centre; the largest radius (0.675 of the half box) leaves some.
    room = narrow - radius * max(first, last) - MARGIN
    room_x, room_y = box.half_width - narrow + room, box.half_height - narrow + room
    sweep = draws.uniform(f"{name} sweep", 0.75, 1.0)
    step_x, step_y = DIRECTION.get(item.motion, (0, 0))
    reach_x, reach_y = sweep * room_x * abs(step_x), sweep * room_y * abs(step_y)
    if item.motion == "orbit":
        reach_x = reach_y = sweep * room
    centre_x, centre_y = box.x, box.y
    if not centred:
        centre_x += (room_x - reach_x) * draws.uniform(f"{name} x", -1.0, 1.0)
        centre_y += (room_y - reach_y) * draws.uniform(f"{name} y", -1.0, 1.0)
    if item.motion == "orbit":
        # One full turn from the first frame to the one that would follow the last.
        start, turn = draws.uniform(f"{name} start", 0.0, 2 * math.pi), draws.pick(f"{name} turn", (-1, 1))
        angles = [start + turn * 2 * math.pi * frame / frames for frame in range(frames)]
        offset_x, offset_y = np.array([[math.cos(a), math.sin(a)] for a in angles]).T
    else:
        offset_x, offset_y = (2 * time - 1) * step_x, (2 * time - 1) * step_y
    path = centre_x + reach_x * offset_x, centre_y + reach_y * offset_y, radius * (first + (last - first) * time)
    return path[0].astype(np.float32), path[1].astype(np.float32), path[2].astype(np.float32)


def _draw_object(video: Array, item: SceneObject, path: tuple[Array, Array, Array], draws: Draws, name: str) -> None:
    """Paints one object into `video` (`T H W C`, 0..255), computing only the window of pixels around it."""
    frames, height, width, _ = video.shape
    unit = min(height, width)
    x_px, y_px, radius_px = (part * np.float32(unit) for part in path)
    half_window = math.ceil(1.15 * float(radius_px.max())) + 1
    left, top = np.floor(x_px).astype(int) - half_window, np.floor(y_px).astype(int) - half_window
    steps = np.arange(2 * half_window + 1, dtype=np.float32) + np.float32(0.5)
    across = (steps + (left - x_px)[:, None]).astype(np.float32)[:, None, :]  # T 1 W
    down = (steps + (top - y_px)[:, None]).astype(np.float32)[:, :, None]  # T H 1
    scale = radius_px[:, None, None]
    cover = np.clip(0.5 - shape_distance(item.shape, across / scale, down / scale) * scale, 0, 1)[..., None]
    first, second = _tones(item.colour, OBJECT_TONE, draws, name)
    paint = first
    if item.texture != "plain":
        mix = _texture(item.texture, across, down, max(4.0, 0.5 * float(radius_px.mean())), draws, name)
        paint = first + mix[..., None] * (second - first)
    paint = np.broadcast_to(paint, (*cover.shape[:3], 3))
    for frame in range(frames):
        rows = slice(max(0, top[frame]), min(height, top[frame] + len(steps)))
        columns = slice(max(0, left[frame]), min(width, left[frame] + len(steps)))
        window = (
            frame,
            slice(rows.start - top[frame], rows.stop - top[frame]),
            slice(columns.start - left[frame], columns.stop - left[frame]),
        )
        region = video[frame, rows, columns]
        region += cover[window] * (paint[window] - region)


def render(scene: Scene, frames: int, height: int, width: int) -> Tensor:
    """Draws a scene: uint8 `C T H W`.

    The whole motion is spread over the clip, so any number of frames shows all of it and nothing leaves the picture.
    Raises UsageError for no frames or a side under 16 pixels.
    """
    if frames < 1:
        raise UsageError(f"frames={frames}: a clip needs at least 1 frame")
    if min(height, width) < MIN_SIDE:
        raise UsageError(f"{height}x{width} is too small to tell shapes apart: use at least {MIN_SIDE} pixels a side")
    draws = Draws("layout", scene.variation)
    video = np.repeat(_background(scene, height, width, draws)[None], frames, axis=0)
    for number, (item, box) in enumerate(zip(scene.objects, _boxes(scene, height, width), strict=True)):
        name = f"object {number}"
        _draw_object(video, item, _path(item, box, frames, draws, name, scene.centred), draws, name)
    return torch.from_numpy(np.rint(video).astype(np.uint8)).permute(3, 0, 1, 2).contiguous()


@cache
def motions_for(frames: int) -> tuple[str, ...]:
    """The motions that a clip of this many frames can show."""
    if frames == 1:
        return ("still",)
    return MOTIONS if frames >= MIN_ORBIT_FRAMES else tuple(name for name in MOTIONS if name != "orbit")
