"""A look at the clips of a source before training begins."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from osp.data.media.shape import Shape
from osp.data.media.video import ClipError
from osp.data.sources import ClipSource

_TRIED = 8  # the first clips


def first_clips(source: ClipSource | None, clips: int = 1) -> list[dict[str, Any]]:
    """The first clips that can be read, of the first few; none of no source."""
    if source is None:
        return []
    return list(islice(_readable(source), clips))


def _readable(source: ClipSource) -> Iterator[dict[str, Any]]:
    for index in range(min(_TRIED, len(source))):
        try:
            yield source.read(index, 0)
        except ClipError:  # the loader reports and replaces it
            continue


def has_captions(source: ClipSource) -> bool:
    """Whether any clip has a caption: of all that are listed, else of the first few."""
    listed = source.has_captions()
    return any(clip["caption"] for clip in first_clips(source, _TRIED)) if listed is None else listed


def clip_shapes(source: ClipSource | None) -> list[Shape]:
    """The sizes in which the source's clips are read, as far as that is known without reading all of them."""
    if source is None:
        return []
    if (buckets := source.buckets()) is not None:
        return [bucket.shape for bucket in buckets]
    return [Shape(*clip["video"].shape[1:]) for clip in first_clips(source)]
