"""Clips that bring images with them, for batches of both: joint training on videos and images (v1.1)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from osp.checks import check_number
from osp.data.media.errors import ClipError
from osp.data.plan import Group, Order
from osp.data.sources.source import ClipSource
from osp.data.summary import Summary
from osp.errors import UsageError
from osp.seeds import seeded


class JointClips(ClipSource):
    """The clips of a source of videos, each with so many further images of another source.

    Args:
        videos: clips of one size.
        pictures: images (clips of one frame) of the same height and width.
        images: how many go with each clip.

    Which images go with a clip is drawn by its key and the plan's draw, as its window is: the same in any process and
    after a restart. A clip beside which an image cannot be read is replaced like one that cannot be read itself.

    Raises UsageError for features, for clips of several sizes, and for fewer pictures than go with one clip.
    """

    def __init__(self, videos: ClipSource, pictures: ClipSource, images: int) -> None:
        check_number("joint clips: images", images, 1, whole=True)
        for name, source in (("videos", videos), ("pictures", pictures)):
            if source.made_with is not None:
                raise UsageError(f"joint clips: {name} are features, which hold no pixels; give shards or a folder")
            if source.buckets() is not None:
                raise UsageError(f"joint clips: {name} have several sizes; give clips of one size, not buckets")
        if len(pictures) < images:
            raise UsageError(f"joint clips: images={images}: there are {len(pictures)} pictures; ask for fewer")
        self.videos, self.pictures, self.images = videos, pictures, images
        self.path, self.dropped = videos.path, videos.dropped
        self.mirrors = videos.mirrors or pictures.mirrors

    def __len__(self) -> int:
        return len(self.videos)

    def fingerprint(self) -> str:
        return f"{self.videos.fingerprint()} with {self.images} images of {self.pictures.fingerprint()}"

    def read(self, index: int, draw: int) -> dict[str, Any]:
        """A clip as `ClipSource.read` gives it, with `images`, uint8 `C n H W`, and `image_captions`, n texts.

        Raises ClipError for a clip or an image that cannot be used.
        """
        clip = self.videos.read(index, draw)
        read = [self.pictures.read(one, draw) for one in self._chosen(str(clip["key"]), draw)]
        wanted = (clip["video"].shape[0], 1, *clip["video"].shape[2:])
        for one in read:
            if tuple(one["video"].shape) != wanted:
                found = " x ".join(map(str, one["video"].shape[1:]))
                raise ClipError(one["key"], f"is of {found}, where an image of the clip's size goes beside it")
        images = torch.cat([one["video"] for one in read], dim=1)
        return clip | {"images": images, "image_captions": [one["caption"] for one in read]}

    def _chosen(self, key: str, draw: int) -> list[int]:
        """The numbers of different pictures."""
        generator, chosen = seeded("images", key, draw), list[int]()
        while len(chosen) < self.images:
            one = int(torch.randint(len(self.pictures), (), generator=generator))
            if one not in chosen:
                chosen.append(one)
        return chosen

    def order(self, group: Group, seed: int, shuffle: bool) -> Order | None:
        """See `ClipSource.order`: that of the videos."""
        return self.videos.order(group, seed, shuffle)

    def record(self, index: int) -> Mapping[str, Any]:
        """See `ClipSource.record`: that of the video."""
        return self.videos.record(index)

    def has_captions(self) -> bool | None:
        """See `ClipSource.has_captions`: of the videos."""
        return self.videos.has_captions()

    def summary(self) -> Summary:
        """See `ClipSource.summary`: of the videos; what is left out of the pictures is said too."""
        summary, other = self.videos.summary(), self.pictures.summary()
        left_out = {f"(pictures) {reason}": count for reason, count in other.left_out.items()}
        return replace(summary, left_out={**summary.left_out, **left_out})

    def collate(self, clips: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """See `ClipSource.collate`; also `images`, uint8 `B C n H W`, and `image_captions`, n texts a clip."""
        images = torch.stack([clip["images"] for clip in clips])
        return self.videos.collate(clips) | {
            "images": images,
            "image_captions": [list(clip["image_captions"]) for clip in clips],
        }
