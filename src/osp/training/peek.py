"""A look at the clips of a source before training begins."""

from itertools import islice
from typing import Any

from osp.data.buckets import Shape
from osp.data.loader import source_buckets
from osp.data.sources import ClipSource
from osp.data.video import ClipError

_TRIED = 8  # the first clips


def first_clips(source: ClipSource | None, clips: int = 1) -> list[dict[str, Any]]:
    """The first clips that can be read, of the first few; none of no source."""
    if source is None:
        return []
    return list(islice(_readable(source), clips))


def _readable(source: ClipSource) -> Any:
    for index in range(min(_TRIED, len(source))):
        try:
            yield source.read(index, 0)
        except ClipError:  # the loader reports and replaces it
            continue


def has_captions(source: Any) -> bool:
    """Whether any clip has a caption: of all that are listed, else of the first few."""
    if hasattr(source, "sources"):
        return any(map(has_captions, source.sources))
    if not hasattr(source, "entries"):
        return any(clip["caption"] for clip in first_clips(source, _TRIED))
    records = (entry.record for entry in source.entries)
    return any(record.get("caption") or any(record.get("captions", ())) for record in records)


def clip_shapes(source: ClipSource | None) -> list[Shape]:
    """The sizes in which the source's clips are read, as far as that is known without reading all of them."""
    if source is None:
        return []
    if (buckets := source_buckets(source)) is not None:
        return [bucket.shape for bucket in buckets]
    return [Shape(*clip["video"].shape[1:]) for clip in first_clips(source)]
