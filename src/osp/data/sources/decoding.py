"""`Decoding`: a file of a video or image -> the clip that training reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import get_worker_info

from osp.checks import check_number
from osp.data.media.limits import DEFAULT_LIMITS, Limits
from osp.data.media.part import WHOLE, Part
from osp.data.media.shape import Shape
from osp.data.media.video import ClipError, probe, read_clip
from osp.data.shards.entry import ClipEntry
from osp.data.sources.words import with_aesthetic_words
from osp.errors import DataError, UsageError
from osp.seeds import seeded


@dataclass(frozen=True)
class Decoding:
    """The choice of frames, mirroring and caption when a clip is read; see `ShardClips`."""

    stride: int = 1
    fps: float | None = None
    random_start: bool = True
    flip: bool = False
    limits: Limits = DEFAULT_LIMITS
    aesthetic_words: bool = False

    def __post_init__(self) -> None:
        check_number("stride", self.stride, 1, whole=True)
        if self.fps is not None and (self.fps <= 0 or self.stride != 1):
            raise UsageError(f"fps={self.fps}, stride={self.stride}: give a positive fps or a stride, not both")

    def __str__(self) -> str:
        rate = f"fps={self.fps}" if self.fps else f"stride={self.stride}"
        words = " aesthetic_words=True" if self.aesthetic_words else ""
        return f"{rate} random_start={self.random_start} flip={self.flip}{words}"

    def read(self, entry: ClipEntry, shape: Shape, draw: int) -> dict[str, Any]:
        """One clip, as `ClipSource.read`; the window and the flip come from a generator seeded by (key, draw)."""
        try:
            data = entry.source()
        except DataError as error:  # a shard cut short costs its own clips only
            raise ClipError(entry.key, str(error)) from error
        return self.decode(data, entry.key, entry.record, shape, draw, entry.part)

    def decode(
        self, data: Path | bytes, key: str, record: Mapping[str, Any], shape: Shape, draw: int, part: Part = WHOLE
    ) -> dict[str, Any]:
        """The same of the bytes or the path of a file, with what a record says of it."""
        generator = seeded(key, draw)
        mirrored = bool(torch.rand((), generator=generator) < 0.5)  # always drawn: `flip` does not move the windows
        video = read_clip(
            data,
            frames=shape.frames,
            size=(shape.height, shape.width),
            stride=self.stride,
            fps=self.fps,
            generator=generator if self.random_start else None,
            name=key,
            threads=0 if get_worker_info() is None else 1,
            limits=self.limits,
            part=part,
        )
        if self.flip and mirrored:
            video = video.flip(-1)
        fps = self.fps or (record.get("fps") or probe(data, key, limits=self.limits).fps) / self.stride
        return {"video": video, **self.texts(key, record, draw), "key": key, "fps": fps}

    def texts(self, key: str, record: Mapping[str, Any], draw: int) -> dict[str, Any]:
        """The `caption` of a read; `captions`, all of them, where there are several.

        With `random_start` one of several is drawn, by (key, draw); else it is the first.
        """
        captions = record.get("captions") or [str(record.get("caption", ""))]
        if self.aesthetic_words:
            captions = [
                with_aesthetic_words(text, record, seeded("words", key, draw, number))
                for number, text in enumerate(captions)
            ]
        caption = captions[0]
        if self.random_start and len(captions) > 1:
            caption = captions[int(torch.randint(len(captions), (), generator=seeded("caption", key, draw)))]
        return {"caption": caption} | ({"captions": captions} if len(captions) > 1 else {})
