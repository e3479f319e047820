"""`ClipSource`, the protocol of all that gives clips to training, encoding and evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from osp.checks import check_number
from osp.data.buckets import Bucket
from osp.data.features.format import FeatureIdentity
from osp.data.media.limits import Limits
from osp.data.plan import Group, Order
from osp.data.shards.index import ClipEntry, Listing
from osp.data.summary import Summary


class ClipSource(Protocol):
    """A numbered list of clips that can be read in any order, by any process.

    The loaders of `osp.data.loader` decide which clip is read when; a source only reads. A class that derives from this
    one needs `__len__`, `fingerprint` and `read`; the rest has defaults, which say that there is no such thing.

    Attributes:
        path: the folder that the clips come from; None: they come from none.
        made_with: what made the features that the clips are; None: the clips are videos.
        vae_origin: the file or folder of the VAE that made the features, if that is known.
        empty: of features the embeddings of the empty text, `text` (`L D`) and `pooled_text` (`P`), if they are kept.
        mirrors: whether half of the clips are read mirrored.
        images: how many further images each clip brings, for joint batches (`JointClips`).
        dropped: clips that are left out (reason -> clips); a reason reads on after "3 clips".
    """

    path: Path | None = None
    made_with: FeatureIdentity | None = None
    vae_origin: str | None = None
    empty: Mapping[str, Tensor] = MappingProxyType({})
    mirrors: bool = False
    images: int = 0
    dropped: Mapping[str, int] = MappingProxyType({})

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """One line that changes when the list of clips or the way they are decoded changes."""
        ...

    def read(self, index: int, draw: int) -> dict[str, Any]:
        """Clip `index` as {"video": uint8 `C T H W`, "caption": str, "key": str, "fps": float (frames a second)}.

        A clip with several captions has all of them under `captions` too. Features have other tensors in the place of
        the video; `collate` knows them. All that is random about the read
        (window, flip) comes from `draw`: the same (index, draw) gives the same tensor in any process. Raises
        `osp.data.media.video.ClipError` for a clip that cannot be used; the loaders replace it.
        """
        ...

    def buckets(self) -> list[Bucket] | None:
        """Every clip in the one bucket whose shape it is read in; None: all clips have one shape.

        The loaders give batches of one bucket each.
        """
        return None

    def order(self, group: Group, seed: int, shuffle: bool) -> Order | None:
        """The order in which training reads the clips of a group; None: any is as good as another."""
        return None

    def record(self, index: int) -> Mapping[str, Any]:
        """The listed record of clip `index`, found without reading the clip; empty if nothing is listed."""
        return {}

    def has_captions(self) -> bool | None:
        """Whether any of the clips has a caption; None: only reading them tells."""
        return None

    def summary(self) -> Summary:
        """How many clips there are, what is left out and why, and how many have captions.

        Verbs log it once, when they begin to read.
        """
        place = type(self).__name__ if self.path is None else str(self.path)
        return Summary(place, len(self), {f"clips {reason}": clips for reason, clips in self.dropped.items()})

    def collate(self, clips: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Clips of one shape, as `read` gives them, as a batch: videos stacked, `B C T H W`."""
        return {
            "video": torch.stack([clip["video"] for clip in clips]),
            "caption": [clip["caption"] for clip in clips],
            "key": [clip["key"] for clip in clips],
            "fps": torch.tensor([clip["fps"] for clip in clips], dtype=torch.float32),
        }


class Elsewhere(Protocol):
    """Shards that lie elsewhere, as `osp.data.streaming` reads them; sources take them in the place of a folder.

    Attributes:
        folder: where their index and listings lie here, without the tars.
    """

    folder: Path

    def listing(self, limits: Limits) -> Listing:
        """All clips; each reads its own bytes. Raises DataError if they hold none, or only features."""
        ...

    def features(self) -> list[ClipEntry]:
        """All clips of shards of features. Raises DataError for shards of anything else."""
        ...

    def order(self, entries: Sequence[ClipEntry], group: Group, seed: int, shuffle: bool) -> Order:
        """The order in which the clips of a group, numbers in `entries`, are read in sequence."""
        ...

    def fingerprint(self, entries: Sequence[ClipEntry]) -> str:
        """One line that changes when the order of these clips changes."""
        ...


class ListedClips(ClipSource, Protocol):
    """A source of clips that are all listed, each with a record.

    Attributes:
        entries: the clips, as their shards list them.
        elsewhere: the shards that they lie in; None: they lie here, where each can be read as well as any other.
        passed_over: files and clips that the listing leaves out, by a reason that reads on after the number.
    """

    entries: list[ClipEntry]
    elsewhere: Elsewhere | None = None
    passed_over: Mapping[str, int] = MappingProxyType({})

    def __len__(self) -> int:
        return len(self.entries)

    def order(self, group: Group, seed: int, shuffle: bool) -> Order | None:
        """See `ClipSource.order`."""
        return None if self.elsewhere is None else self.elsewhere.order(self.entries, group, seed, shuffle)

    def _sequence(self) -> str:
        """The end of a fingerprint, on the order in which shards are read; empty where any clip can be read as well."""
        return "" if self.elsewhere is None else f" {self.elsewhere.fingerprint(self.entries)}"

    def record(self, index: int) -> Mapping[str, Any]:
        """See `ClipSource.record`."""
        return self.entries[index].record

    def has_captions(self) -> bool:
        """See `ClipSource.has_captions`."""
        return any(map(_is_captioned, self.entries))

    def summary(self) -> Summary:
        """See `ClipSource.summary`."""
        summary = super().summary()
        captioned = sum(map(_is_captioned, self.entries))
        return replace(summary, left_out={**summary.left_out, **self.passed_over}, captioned=captioned)


class FirstClips(ClipSource):
    """The first so many clips of a source, or all if it has fewer. Raises UsageError for less than one."""

    def __init__(self, source: ClipSource, clips: int) -> None:
        check_number("train_clips or val_clips", clips, 1, whole=True)
        self.source, self.clips = source, clips
        self.path, self.made_with, self.vae_origin = source.path, source.made_with, source.vae_origin
        self.empty, self.mirrors, self.dropped = source.empty, source.mirrors, source.dropped
        self.images = source.images

    def __len__(self) -> int:
        return min(self.clips, len(self.source))

    def fingerprint(self) -> str:
        return f"first {len(self)} of {self.source.fingerprint()}"

    def read(self, index: int, draw: int) -> dict[str, Any]:
        """See `ClipSource.read`."""
        return self.source.read(index, draw)

    def buckets(self) -> list[Bucket] | None:
        """See `ClipSource.buckets`; a bucket without any of the first clips is left out."""
        if (buckets := self.source.buckets()) is None:
            return None
        kept = [(bucket, bucket.clips[bucket.clips < len(self)]) for bucket in buckets]
        return [Bucket(bucket.shape, bucket.tokens, few) for bucket, few in kept if len(few)]

    def order(self, group: Group, seed: int, shuffle: bool) -> Order | None:
        """See `ClipSource.order`."""
        return self.source.order(group, seed, shuffle)

    def record(self, index: int) -> Mapping[str, Any]:
        """See `ClipSource.record`."""
        return self.source.record(index)

    def has_captions(self) -> bool | None:
        """See `ClipSource.has_captions`; of all clips of the source."""
        return self.source.has_captions()

    def summary(self) -> Summary:
        """See `ClipSource.summary`; of all clips of the source."""
        return self.source.summary()

    def collate(self, clips: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """See `ClipSource.collate`."""
        return self.source.collate(clips)


def _is_captioned(entry: ClipEntry) -> bool:
    """Whether a clip's record has a caption, or of features any that is not empty."""
    return bool(entry.record.get("caption")) or any(entry.record.get("captions", ()))
