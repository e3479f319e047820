"""Procedural clips as a source: drawn when they are read."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b
from json import dumps
from pathlib import Path
from typing import Any

from torch import Tensor

from osp.checks import check_number
from osp.data.procedural.drawing import DRAWING_VERSION, MIN_SIDE, motions_for, render
from osp.data.procedural.scene import (
    BACKGROUND_COLOURS,
    COLOURS,
    SIZES,
    Scene,
    backgrounds_for,
    caption,
    check_word,
    scene_for,
)
from osp.data.shards.build import write_rendered
from osp.data.shards.stored import ShardReport
from osp.data.sources.source import ClipSource
from osp.errors import UsageError


class SyntheticClips(ClipSource):
    """`clips` procedural captioned clips of one length and size, drawn when they are read.

    Args:
        clips: how many clips the source holds; clip i is the same whatever this number is.
        frames: frames a clip; with 1 the clips are images and show still scenes only, under 5 none orbits.
        height, width: pixels, at least 16.
        fps: frames a second that the clips are said to have.
        seed: another seed, other clips.
        objects: 1 or 2 objects in every clip; None mixes four clips of one with one clip of two.
        plain: no textures, on objects and background.
        sizes: of the objects, some of small, medium and large; None: all.
        backgrounds: colours of backgrounds, such that every colour of an object stands out from one of them, as black
            and white; None: all.
        centred: every object, or the middle of its way, is in the middle of the frame (of two: of its half).

    Raises UsageError for values outside these.
    """

    def __init__(
        self,
        clips: int,
        frames: int,
        height: int,
        width: int,
        fps: float = 8.0,
        seed: int = 0,
        objects: int | None = None,
        plain: bool = False,
        sizes: Sequence[str] | None = None,
        backgrounds: Sequence[str] | None = None,
        centred: bool = False,
    ) -> None:
        for name, value, least in (
            ("clips", clips, 1),
            ("frames", frames, 1),
            ("height", height, MIN_SIDE),
            ("width", width, MIN_SIDE),
        ):
            check_number(f"synthetic clips: {name}", value, least, whole=True)
        check_number("synthetic clips: fps", fps, above=0)
        check_number("synthetic clips: objects", objects, 1, 2, whole=True, null="a mix of both")
        self.clips = clips
        self.frames = frames
        self.height = height
        self.width = width
        self.fps = float(fps)
        self.seed = seed
        self.objects = objects
        self.plain = plain
        self.sizes = list(SIZES if sizes is None else sizes)
        self.backgrounds = list(BACKGROUND_COLOURS if backgrounds is None else backgrounds)
        self.centred = centred
        for colour in self.backgrounds:
            check_word("background", colour, BACKGROUND_COLOURS)
        for pair in itertools.combinations(COLOURS, 1 if objects == 1 else 2):
            if not set(self.backgrounds) & set(backgrounds_for(pair)):
                stands = "stands" if objects == 1 else "stand"
                raise UsageError(
                    f"synthetic clips: backgrounds={self.backgrounds} have none that {' and '.join(pair)} {stands} "
                    "out from; add others"
                )
        for size in self.sizes:
            check_word("size", size, SIZES)
        if objects != 1 and set(self.sizes) <= {"large"}:
            raise UsageError(f"synthetic clips: sizes={self.sizes} leave none for two objects: use objects=1")

    def __len__(self) -> int:
        return self.clips

    def fingerprint(self) -> str:
        """Changes when any setting, or the way clips are drawn, changes."""
        settings = dumps([type(self).__name__, DRAWING_VERSION, vars(self)], sort_keys=True)
        return blake2b(settings.encode(), digest_size=16).hexdigest()

    def scene(self, index: int) -> Scene:
        """The truth about clip `index`."""
        if not 0 <= index < self.clips:
            raise IndexError(f"clip {index} of {self.clips}")
        return scene_for(
            self.seed,
            index,
            objects=self.objects,
            motions=motions_for(self.frames),
            plain=self.plain,
            sizes=self.sizes,
            backgrounds=self.backgrounds,
            centred=self.centred,
        )

    def read(self, index: int, draw: int) -> dict[str, Any]:
        """Clip `index` as video (uint8 `C T H W`), caption, key and fps; `draw` changes nothing."""
        scene = self.scene(index)
        return {
            "video": render(scene, self.frames, self.height, self.width),
            "caption": caption(scene),
            "key": f"synthetic-{self.seed}-{index:06d}",
            "fps": self.fps,
        }


def write_drawn(output: Path, settings: Mapping[str, Any], *, shard_clips: int, shard_bytes: int) -> ShardReport:
    """Write procedural clips, `settings` of `SyntheticClips`, into shards in `output`, losslessly.

    A folder that holds some of them goes on after these. Raises UsageError for settings that make no sense or others
    than the folder was begun with, but for the number of clips.
    """
    clips = SyntheticClips(**settings)
    about = {key: value for key, value in settings.items() if key != "clips"}

    def rendered() -> Iterator[tuple[str, Tensor, Mapping[str, Any]]]:
        for index in range(len(clips)):
            clip = clips.read(index, 0)
            yield f"{index:06d}", clip["video"], {"fps": clip["fps"], "caption": clip["caption"], "source": clip["key"]}

    sizes = {"shard_clips": shard_clips, "shard_bytes": shard_bytes}
    return write_rendered(rendered(), output, settings={"synthetic": about}, lossless=True, **sizes)
