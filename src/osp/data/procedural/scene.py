"""The scenes of procedural clips: the words they are built from, the truth about one clip, and its caption."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from osp.errors import UsageError

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring")
MOTIONS = ("left", "right", "up", "down", "orbit", "grow", "shrink", "still")
SIZES = ("small", "medium", "large")
OBJECT_TEXTURES = ("plain", "striped", "dotted")
BACKGROUND_TEXTURES = ("plain", "gradient", "striped", "checked", "dotted", "speckled")

PALETTE = {
    "red": (215, 30, 40),
    "green": (35, 160, 60),
    "blue": (30, 90, 225),
    "yellow": (245, 225, 45),
    "purple": (150, 45, 160),
    "orange": (250, 140, 20),
    "pink": (255, 160, 205),
    "cyan": (50, 210, 225),
    "white": (245, 245, 245),
    "black": (16, 16, 16),
    "grey": (128, 128, 128),
}
"""sRGB of every colour word; `grey` is kept for backgrounds."""
COLOURS = tuple(name for name in PALETTE if name != "grey")
BACKGROUND_COLOURS = tuple(PALETTE)

# Least CIELAB (1976) distance between any tone of an object and any tone of its background: fifteen just noticeable
# differences (2.3 each) and more. It forbids blue with purple, and pink, cyan or white with white or grey.
CONTRAST = 38.0
# How far a texture's second tone is mixed towards black (towards white for dark colours).
OBJECT_TONE = 0.2
BACKGROUND_TONE = 0.25

_Item = TypeVar("_Item")


class Draws:
    """Named random draws: each depends on the seed words and its own name only.

    Cryptographic hashing rather than a generator's stream, so a clip is the same on every platform and library version,
    and a new property does not shift the draws of the others.
    """

    def __init__(self, *seed: int | str) -> None:
        self._seed = "/".join(str(part) for part in seed)

    def integer(self, name: str) -> int:
        """64 random bits."""
        digest = hashlib.blake2b(f"{self._seed}/{name}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")

    def uniform(self, name: str, low: float = 0.0, high: float = 1.0) -> float:
        """A number in [low, high)."""
        return low + (high - low) * (self.integer(name) >> 11) / 2**53

    def pick(self, name: str, items: Sequence[_Item]) -> _Item:
        """One of `items`."""
        return items[self.integer(name) % len(items)]


def lab(colour: ArrayLike) -> NDArray[np.float64]:
    """`... 3` sRGB in 0..255 -> `... 3` CIELAB (D65), in which distance follows what people see."""
    value = np.asarray(colour, dtype=np.float64) / 255.0
    linear = np.where(value <= 0.04045, value / 12.92, ((np.maximum(value, 0.0) + 0.055) / 1.055) ** 2.4)
    matrix = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    xyz = linear @ matrix.T / np.array([0.95047, 1.0, 1.08883])
    root = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    x, y, z = root[..., 0], root[..., 1], root[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def second_tone(colour: NDArray[np.float64], amount: float) -> NDArray[np.float64]:
    """The other tone of a texture: `colour` (sRGB 0..255) darkened, or lightened where it is dark, by `amount`."""
    towards = 255.0 if lab(colour)[0] < 30.0 else 0.0
    return colour * (1.0 - amount) + towards * amount


@cache
def contrast(colour: str, background: str) -> float:
    """CIELAB distance of the two tones of object `colour` from the two tones of `background`, at their closest."""
    near = [np.array(PALETTE[colour], dtype=np.float64)]
    near.append(second_tone(near[0], OBJECT_TONE))
    far = np.array(PALETTE[background], dtype=np.float64)
    # A gradient shows all that lies between its two tones.
    mixed = [far + (second_tone(far, BACKGROUND_TONE) - far) * step for step in (0.0, 0.5, 1.0)]
    return min(float(np.linalg.norm(lab(a) - lab(b))) for a in near for b in mixed)


def backgrounds_for(colours: Sequence[str]) -> tuple[str, ...]:
    """The background colours on which objects of all these colours stand out."""
    return tuple(name for name in BACKGROUND_COLOURS if all(contrast(c, name) >= CONTRAST for c in colours))


def check_word(kind: str, word: str, words: Sequence[str]) -> None:
    if word not in words:
        raise UsageError(f"unknown {kind} {word!r}: use one of {', '.join(words)}")


@dataclass(frozen=True)
class SceneObject:
    """One shape of a scene."""

    shape: str
    colour: str
    motion: str
    size: str = "medium"
    texture: str = "plain"

    def __post_init__(self) -> None:
        check_word("shape", self.shape, SHAPES)
        check_word("colour", self.colour, COLOURS)
        check_word("motion", self.motion, MOTIONS)
        check_word("size", self.size, SIZES)
        check_word("object texture", self.texture, OBJECT_TEXTURES)


@dataclass(frozen=True)
class Scene:
    """The truth about one clip: one or two objects before a background.

    `variation` seeds what the words leave open: where the objects are, how far they move, small differences of tint,
    and the caption's wording. With `centred` the middle of an object's path is that of its part of the frame.
    Raises UsageError for an unknown word, two objects of one colour, or an object that would not stand out from its
    background.
    """

    objects: tuple[SceneObject, ...]
    background: str = "grey"
    texture: str = "plain"
    variation: int = 0
    centred: bool = False

    def __post_init__(self) -> None:
        check_word("background", self.background, BACKGROUND_COLOURS)
        check_word("background texture", self.texture, BACKGROUND_TEXTURES)
        if len(self.objects) not in (1, 2):
            raise UsageError(f"a scene has 1 or 2 objects, not {len(self.objects)}")
        colours = [item.colour for item in self.objects]
        if len(set(colours)) < len(colours):
            raise UsageError(f"two objects of one scene need two colours, both are {colours[0]}")
        for colour in colours:
            if contrast(colour, self.background) < CONTRAST:
                raise UsageError(
                    f"a {colour} object does not stand out from a {self.background} background: "
                    f"use one of {', '.join(backgrounds_for(colours))}"
                )


def scene_for(
    seed: int,
    index: int,
    *,
    objects: int | None = None,
    motions: Sequence[str] = MOTIONS,
    plain: bool = False,
    sizes: Sequence[str] = SIZES,
    backgrounds: Sequence[str] = BACKGROUND_COLOURS,
    centred: bool = False,
) -> Scene:
    """The scene of clip `index` in the endless series `seed`.

    `objects` is 1 or 2; None draws two objects for one clip in five. Motions are drawn evenly from `motions`, shapes
    and colours evenly from all, sizes evenly from `sizes`, without large ones where there are two objects, and the
    background evenly from those of `backgrounds` that the objects stand out from. `plain` leaves out all textures,
    `centred` is as for `Scene`, and neither changes anything else. Raises UsageError if no size or no background is
    left.
    """
    draws = Draws("scene", seed, index)
    count = objects if objects is not None else (2 if draws.uniform("count") < 0.2 else 1)
    fitting = [size for size in sizes if count == 1 or size != "large"]
    if not fitting:
        raise UsageError(f"sizes={list(sizes)} leave none for {count} objects; two of them are small or medium")
    drawn: list[SceneObject] = []
    for number in range(count):
        taken = {item.colour for item in drawn}
        drawn.append(
            SceneObject(
                shape=draws.pick(f"shape {number}", SHAPES),
                colour=draws.pick(f"colour {number}", [name for name in COLOURS if name not in taken]),
                motion=draws.pick(f"motion {number}", motions),
                size=draws.pick(f"size {number}", fitting),
                texture="plain" if plain else draws.pick(f"texture {number}", ("plain", *OBJECT_TEXTURES)),
            )
        )
    colours = [item.colour for item in drawn]
    before = [name for name in backgrounds_for(colours) if name in backgrounds]
    if not before:
        raise UsageError(f"backgrounds={list(backgrounds)} leave none that {' and '.join(colours)} stand out from")
    return Scene(
        objects=tuple(drawn),
        background=draws.pick("background", before),
        texture="plain" if plain else draws.pick("background texture", BACKGROUND_TEXTURES),
        variation=draws.integer("variation"),
        centred=centred,
    )


# No phrase holds the name of a shape ("moves in a circle" would), so a caption names exactly the shapes it shows.
MOTION_PHRASES = {
    "left": ("moves to the left", "slides left", "drifts from right to left"),
    "right": ("moves to the right", "slides right", "drifts from left to right"),
    "up": ("moves up", "rises towards the top", "floats upwards"),
    "down": ("moves down", "sinks towards the bottom", "falls downwards"),
    "orbit": ("orbits around a point", "travels in an orbit", "goes round and round"),
    "grow": ("grows", "grows larger", "gets bigger and bigger"),
    "shrink": ("shrinks", "shrinks in place", "gets smaller and smaller"),
    "still": ("stays still", "does not move", "stands still"),
}
_TEMPLATES = (
    "{objects}",
    "{objects} over {background}",
    "{objects} in front of {background}",
    "on {background}, {objects}",
)


def _with_article(words: Sequence[str]) -> str:
    phrase = " ".join(word for word in words if word)
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _background_phrase(scene: Scene) -> str:
    if scene.texture == "gradient":
        return _with_article([scene.background, "gradient background"])
    return _with_article([scene.background, scene.texture if scene.texture != "plain" else "", "background"])


def caption(scene: Scene) -> str:
    """An English sentence, the same each time, that names colour, shape and motion of every object.

    Size, texture and background are named in some of the wordings.
    """
    draws = Draws("caption", scene.variation)
    phrases = []
    for number, item in enumerate(scene.objects):
        size = item.size if draws.uniform(f"size {number}") < 0.7 else ""
        texture = item.texture if item.texture != "plain" and draws.uniform(f"texture {number}") < 0.7 else ""
        noun = _with_article([size, texture, item.colour, item.shape])
        phrases.append(f"{noun} {draws.pick(f'motion {number}', MOTION_PHRASES[item.motion])}")
    joint = draws.pick("joint", (" and ", " while "))
    template = draws.pick("template", _TEMPLATES)
    return template.format(objects=joint.join(phrases), background=_background_phrase(scene))


def _one_of(words: Sequence[str]) -> str:
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))


_SHAPE = re.compile(rf"\b({_one_of(SHAPES)})\b")
_NOUN = re.compile(
    rf"\b(?:({_one_of(SIZES)}) )?(?:({_one_of(OBJECT_TEXTURES)}) )?({_one_of(COLOURS)}) ({_one_of(SHAPES)})\b"
)
_MOTIONS = {name: re.compile(rf"\b({_one_of(phrases)})\b") for name, phrases in MOTION_PHRASES.items()}


def read_caption(text: str) -> SceneObject:
    """The truth that a caption of one object tells: the inverse of `caption`; what it leaves open has its default.

    Any text will do that names one shape, its colour before it and one motion, in the words of `caption`.
    Raises UsageError, with the text, if one of them is missing or there are two.
    """
    said = " ".join(text.lower().split())
    shapes = _SHAPE.findall(said)
    if len(shapes) != 1:
        named = f"{len(shapes)} shapes ({', '.join(shapes)}), not one" if shapes else "no shape that is known"
        raise UsageError(f"the prompt {text!r} names {named}; use one of {', '.join(SHAPES)}")
    noun = _NOUN.search(said)
    if noun is None:
        raise UsageError(
            f"the prompt {text!r} names no colour that is known before {shapes[0]!r}; use one of {', '.join(COLOURS)}"
        )
    motions = [name for name, phrases in _MOTIONS.items() if phrases.search(said)]
    if len(motions) != 1:
        named = f"{len(motions)} motions ({', '.join(motions)}), not one" if motions else "no motion that is known"
        phrases = ", ".join(phrases[0] for phrases in MOTION_PHRASES.values())
        raise UsageError(f"the prompt {text!r} names {named}; use one of: {phrases}")
    size, texture, colour, shape = noun.groups()
    return SceneObject(shape, colour, motions[0], size or "medium", texture or "plain")
