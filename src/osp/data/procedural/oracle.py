"""Reads colour, shape and motion of a procedural clip back from its pixels, with no learned weights.

It measures what is left of a clip after a VAE, or how well a generated clip follows its caption. It knows only what
`scene` promises: upright shapes of named colours that keep off the edge of the frame, before a background
whose colours lie between two tones.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from osp.data.procedural.drawing import shape_distance
from osp.data.procedural.scene import COLOURS, PALETTE, SHAPES, lab
from osp.errors import UsageError

Array = NDArray[np.float32]

# Colours nearer than this (RGB, 0..255) to the background count as background.
MIN_DIFFERENCE = 24.0
# An object covers at least this many pixels, and at most this part of the frame.
MIN_AREA_PX, MAX_AREA = 6.0, 0.6
# Below this overlap with the best template an outline is no shape we know.
MIN_SHAPE_OVERLAP = 0.7
# Change of the logarithm of the radius over the clip from which an object grows or shrinks (drawn: 0.73).
MIN_GROWTH = 0.3
# Standard deviation of the centre, relative to the frame's shorter side, from which it moves (drawn: 0.034 and more).
MIN_SPREAD = 0.022
# Narrow over wide extent of the centre's path from which it is a turn, not a line.
MIN_ROUNDNESS = 0.35

# The pixels that touch a pixel in its own frame, corners included (T H W).
NEIGHBOURS = np.ones((1, 3, 3), dtype=bool)

_GRID = 28
# Half side of the normalised silhouette, in units of the square root of the shape's area.
_REACH = 1.05
# Templates are drawn with these areas (square root, pixels) and blurs (pixels), as both round an outline.
_TEMPLATE_SCALES = (4.0, 5.5, 8.0, 12.0, 18.0, 28.0)
_TEMPLATE_BLURS = (0.0, 1.0, 2.0)


@dataclass(frozen=True)
class Reading:
    """The look of an object: colour, shape and motion, each None if the pixels do not show it."""

    colour: str | None
    shape: str | None
    motion: str | None


UNKNOWN = Reading(None, None, None)


def _dot(first: Array, second: Array) -> Array:
    """Over the last axis. Not `@`: on three channels a BLAS gains nothing and wakes all its threads."""
    return np.einsum("...c,...c->...", first, second)


@dataclass(frozen=True)
class _Tones:
    """Two colours and all between them: a segment in RGB, `centre + [low, high] * axis`."""

    centre: Array
    axis: Array
    low: float
    high: float

    @classmethod
    def fit(cls, pixels: Array, tail: float) -> "_Tones":
        """The tones of `N 3` pixels; `tail` (per cent) at each end of the segment is left out as noise."""
        centre = pixels.mean(axis=0)
        away = pixels - centre
        axis = np.linalg.eigh(np.einsum("nc,nd->cd", away, away))[1][:, -1].astype(np.float32)
        low, high = np.percentile(_dot(away, axis), (tail, 100.0 - tail))
        return cls(centre, axis, float(low), float(high))

    def distance(self, pixels: Array) -> Array:
        """`... 3` -> `...`, RGB distance to the nearest colour of the segment."""
        away = pixels - self.centre
        along = _dot(away, self.axis)
        nearest = np.clip(along, self.low, self.high)
        squared = _dot(away, away) - nearest * (2 * along - nearest)
        return np.sqrt(np.maximum(squared, 0))


def _pixels(video: Tensor) -> Array:
    """uint8 or [-1, 1] float `C T H W` -> `T H W C` in 0..255."""
    if video.ndim != 4 or video.shape[0] != 3:
        raise UsageError(f"the oracle reads one RGB clip, C T H W with C = 3, not shape {tuple(video.shape)}")
    values = video.detach().cpu()
    if values.is_floating_point():
        values = ((values.float() + 1) * 127.5).clamp(0, 255).nan_to_num(0.0)
    return np.ascontiguousarray(values.permute(1, 2, 3, 0).numpy(), dtype=np.float32)


def _border(pixels: Array) -> Array:
    """The `N 3` pixels at the edge of all frames, where no object comes."""
    height, width = pixels.shape[1:3]
    edge = max(1, round(0.03 * min(height, width)))
    sides = (pixels[:, :edge], pixels[:, -edge:], pixels[:, edge:-edge, :edge], pixels[:, edge:-edge, -edge:])
    return np.concatenate([side.reshape(-1, 3) for side in sides])


def _name_colours(colours: Array) -> NDArray[np.intp]:
    """`N 3` RGB -> the index in COLOURS of the nearest one, in CIELAB."""
    named = lab([PALETTE[name] for name in COLOURS])
    return np.linalg.norm(lab(colours)[:, None] - named, axis=-1).argmin(axis=1)


def _largest_blobs(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """`T H W` -> the same with only the largest connected region of each frame."""
    labels, count = ndimage.label(mask, np.pad(NEIGHBOURS, ((1, 1), (0, 0), (0, 0))))
    if count == 0:
        return mask
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    # Labels rise with the frame, so the largest label of a frame bounds its range.
    last = np.maximum.accumulate(labels.reshape(len(labels), -1).max(axis=1))
    first = np.concatenate([[0], last[:-1]])
    kept = np.zeros(count + 1, dtype=bool)
    for low, high in zip(first, last, strict=True):
        if high > low:
            kept[low + 1 + sizes[low + 1 : high + 1].argmax()] = True
    return kept[labels]


@dataclass(frozen=True)
class _Track:
    """Where an object is in the frames it was found in."""

    frames: NDArray[np.intp]  # N, indices
    x: Array  # N, pixels
    y: Array
    area: Array  # N, pixels
    cover: Array  # N H W, 0..1


def _track(cover: Array) -> _Track | None:
    """The track of an object, from `T H W` coverage; None if fewer than half of the frames show one."""
    area = cover.sum(axis=(1, 2))
    found = np.flatnonzero((area >= MIN_AREA_PX) & (area <= MAX_AREA * cover[0].size))
    if len(found) == 0 or 2 * len(found) < len(cover):
        return None
    cover, area = cover[found], area[found]
    x = cover.sum(axis=1) @ (np.arange(cover.shape[2], dtype=np.float32) + 0.5) / area
    y = cover.sum(axis=2) @ (np.arange(cover.shape[1], dtype=np.float32) + 0.5) / area
    return _Track(found, x, y, area, cover)


def _silhouette(track: _Track) -> Array:
    """`GRID GRID` mean outline, centred and scaled to one area; large views, which show more, weigh more."""
    height, width = track.cover.shape[1:]
    steps = (torch.arange(_GRID) + 0.5) / _GRID * 2 - 1
    reach = torch.from_numpy(_REACH * np.sqrt(track.area))[:, None]
    across = (torch.from_numpy(track.x)[:, None] + steps * reach) * (2 / width) - 1
    down = (torch.from_numpy(track.y)[:, None] + steps * reach) * (2 / height) - 1
    size = (len(track.frames), _GRID, _GRID)
    places = torch.stack([across[:, None].expand(size), down[:, :, None].expand(size)], dim=-1).float()
    views = torch.nn.functional.grid_sample(torch.from_numpy(track.cover)[:, None], places, align_corners=False)
    return np.average(views[:, 0].numpy(), axis=0, weights=track.area).astype(np.float32)


@cache
def _templates(scale: float) -> Array:
    """`SHAPES BLURS GRID GRID`: what `_silhouette` gives for each shape whose area is scale^2 pixels."""
    side = math.ceil(4 * scale) + 8
    # Nine places relative to the pixel grid.
    shift_y, shift_x = (np.repeat([0.0, 1 / 3, 2 / 3], 3), np.tile([0.0, 1 / 3, 2 / 3], 3))
    points = np.arange(side, dtype=np.float32) + 0.5 - side / 2
    fine = np.linspace(-1.1, 1.1, 512, dtype=np.float32)
    rows = []
    for shape in SHAPES:
        area = 2.2**2 * float((shape_distance(shape, fine[None], fine[:, None]) < 0).mean())
        radius = scale / math.sqrt(area)
        x = ((points - shift_x[:, None]) / radius).astype(np.float32)[:, None, :]
        y = ((points - shift_y[:, None]) / radius).astype(np.float32)[:, :, None]
        cover = np.clip(0.5 - shape_distance(shape, x, y) * radius, 0, 1)
        for blur in _TEMPLATE_BLURS:
            track = _track(ndimage.gaussian_filter(cover, (0, blur, blur)) if blur else cover)
            assert track is not None
            rows.append(_silhouette(track))
    return np.stack(rows).reshape(len(SHAPES), len(_TEMPLATE_BLURS), _GRID, _GRID)


def _read_shape(track: _Track) -> str | None:
    scale = math.sqrt(float(np.average(track.area, weights=track.area)))
    drawn = min(_TEMPLATE_SCALES, key=lambda other: abs(math.log(other / scale)))
    templates, seen = _templates(drawn), _silhouette(track)
    overlap = np.minimum(templates, seen).sum(axis=(2, 3)) / np.maximum(templates, seen).sum(axis=(2, 3))
    best = overlap.max(axis=1)
    return SHAPES[int(best.argmax())] if best.max() >= MIN_SHAPE_OVERLAP else None


def _read_motion(track: _Track, unit: int) -> str:
    """The name of a motion, from the paths of centre and area; `unit` is the frame's shorter side in pixels."""
    if len(track.frames) == 1:
        return "still"
    time = track.frames - track.frames.mean()
    time = time / (time @ time)
    duration = float(track.frames[-1] - track.frames[0])
    growth = float(time @ (0.5 * np.log(track.area))) * duration
    if abs(growth) >= MIN_GROWTH:
        return "grow" if growth > 0 else "shrink"
    path = np.stack([track.x, track.y]) / unit
    spread = np.linalg.eigvalsh(np.cov(path, bias=True))
    narrow, wide = np.sqrt(np.maximum(spread, 0))
    if wide < MIN_SPREAD:
        return "still"
    if narrow >= MIN_ROUNDNESS * wide:
        return "orbit"
    step_x, step_y = path @ time
    if abs(step_x) >= abs(step_y):
        return "right" if step_x > 0 else "left"
    return "down" if step_y > 0 else "up"


def _covers(pixels: Array, objects: int) -> Iterator[tuple[str, Array]]:
    """Colour and `T H W` coverage (0..1) of the `objects` largest objects, the largest first."""
    border = _border(pixels)
    background = _Tones.fit(border, tail=0.5)
    from_background = background.distance(pixels)
    # Noise raises the bar: no more than one border pixel in a hundred may come near it.
    threshold = max(MIN_DIFFERENCE, 1.5 * float(np.percentile(background.distance(border), 99)))
    differs = from_background > threshold
    if objects == 1:
        differs = _largest_blobs(differs)
    # Pixels at an outline are half background, so an object's own colours are sought where the difference peaks (all
    # that a thin or blurred shape has), and a pixel inside the outline (peaks may miss one of a texture's two tones).
    peaks = from_background >= 0.92 * ndimage.maximum_filter(from_background, size=(1, 3, 3))
    inside = ndimage.binary_erosion(
        differs & (from_background >= 0.5 * ndimage.maximum_filter(from_background, size=(1, 5, 5))), NEIGHBOURS
    )
    pure = differs & (peaks | inside)
    seeds = pixels[pure]
    if len(seeds) < MIN_AREA_PX:
        return
    groups = [seeds]
    if objects > 1:
        names = _name_colours(seeds)
        counts = np.bincount(names, minlength=len(COLOURS))
        largest = np.argsort(-counts, kind="stable")[:objects]
        groups = [seeds[names == name] for name in largest if counts[name] >= 0.1 * counts.max()]
    tones = [_Tones.fit(group, tail=10.0) for group in groups]
    distances = np.stack([tone.distance(pixels) for tone in tones])
    nearest = distances.argmin(axis=0)
    for number, (group, distance) in enumerate(zip(groups, distances, strict=True)):
        # At an outline the colour is a mix of background and object: its place between the two is the coverage.
        cover = from_background / (from_background + distance + 1e-3)
        blob = _largest_blobs(differs & (cover > 0.5) & (nearest == number))
        cover = np.where(ndimage.binary_dilation(blob, NEIGHBOURS), cover, 0)
        yield COLOURS[int(_name_colours(group.mean(axis=0)[None])[0])], cover.astype(np.float32)


def read_objects(video: Tensor, objects: int = 2) -> list[Reading]:
    """Reads up to `objects` objects of different colours, the largest first.

    With one object it is `read`. With more it is a best effort: objects are told apart by colour alone, so two of one
    colour are read as one, and a textured object may be found less surely.

    Args:
        video: one clip `C T H W`, uint8 or float in [-1, 1].
        objects: 1 or more.

    Raises UsageError for another shape of video or no objects.
    """
    if objects < 1:
        raise UsageError(f"objects={objects}: the oracle reads 1 object or more")
    pixels = _pixels(video)
    readings = []
    for colour, cover in _covers(pixels, objects):
        track = _track(cover)
        if track is not None:
            readings.append(Reading(colour, _read_shape(track), _read_motion(track, min(pixels.shape[1:3]))))
    return readings


def read(video: Tensor) -> Reading:
    """Reads the one object of a clip `C T H W` (uint8, or float in [-1, 1]).

    A clip of one frame reads as "still". A clip without an object that stands out from its background in at least half
    of the frames, noise or an empty frame for instance, reads as `UNKNOWN`; an object whose outline resembles no known
    shape has shape None.
    """
    readings = read_objects(video, objects=1)
    return readings[0] if readings else UNKNOWN
