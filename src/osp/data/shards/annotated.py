"""Annotations as published -> shards: each file once and whole, with a record for each clip that is a part of it."""

import hashlib
import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from osp.checks import check_number
from osp.data.media.clips import Examined, examine_whole
from osp.data.media.limits import DEFAULT_LIMITS, Limits
from osp.data.media.video import VideoInfo
from osp.data.shards.annotation_files import annotation_files
from osp.data.shards.annotations import Annotation, AnnotationReader, UnfitError
from osp.data.shards.stored import ShardReport, Source, check_same_words, mark_gone, record_of, report_of, said_digest
from osp.data.shards.workers import Crashed, Workers, default_workers
from osp.data.shards.writer import ShardWriter
from osp.documents import printable
from osp.errors import DataError

log = logging.getLogger(__name__)

_BROKEN = "records of files that cannot be read"


@dataclass(frozen=True)
class _Annotated(Source):
    """A file, and the clips that are parts of it."""

    clips: tuple[Annotation, ...]


def write_annotated(
    annotations: Path,
    output: Path,
    *,
    folder: Path | None = None,
    strip: str = "",
    shard_clips: int = 1000,
    shard_bytes: int = 1_000_000_000,
    workers: int | None = None,
    watch: Callable[[int, int], None] = lambda done, files: None,
    limits: Limits = DEFAULT_LIMITS,
    drop_gone: bool = False,
) -> ShardReport:
    """Write the files that annotations name, and a record for each clip in them, into WebDataset shards in `output`.

    A file is stored byte for byte and once, whatever its length; `cut` and `crop` of a record say which part of it a
    clip is, and are applied when it is read. All frames of a file are decoded before it is stored. Records that do not
    fit are counted by their reason in `left_out` of the report.

    Run again, it does only what is new, as `osp.data.shards.build.write_shards` does.

    Args:
        annotations: what `annotation_files` takes.
        folder: that paths of a single file of annotations are relative to; None: its own folder.
        strip: see `AnnotationReader`.
        shard_clips: a shard is closed before it would have more clips; those of one file stay together all the same.
        drop_gone: readers are to leave out the clips of files that are no longer annotated.
        workers, shard_bytes, watch, limits: as for `write_shards`.

    Raises:
        UsageError: a setting makes no sense, `output` was begun otherwise, or a stored file is annotated otherwise now.
        DataError: annotations cannot be read, or no record of them fits.
    """
    check_number("workers", workers, 0, whole=True, null="one a core")
    workers = default_workers() if workers is None else workers
    reader = AnnotationReader(limits, strip)
    read = [clip for file in annotation_files(annotations, folder) for clip in reader.read(file)]
    reader.unfit.warn(annotations)
    sources = _sources(read)
    with ShardWriter(output, {"annotated": True}, shard_clips, shard_bytes) as writer:
        check_same_words(output, sources, writer.sources, "records than the annotations", "use another output folder")
        before, gone = writer.clips, mark_gone(annotations, sources, writer, drop_gone)
        todo = [source for source in sources if not source.is_done(writer.sources.get(source.name))]
        if todo:
            log.info("%s: %d clips in %d files, %d of them new", annotations, len(read), len(sources), len(todo))
            with Workers(workers, preload=["osp.data.media.clips"]) as pool:
                calls = ((examine_whole, source.path, limits, source.known(writer.sources)) for source in todo)
                for done, (source, examined) in enumerate(zip(todo, pool.in_order(calls), strict=True), 1):
                    _store(source, examined, writer)
                    watch(done, len(todo))
        writer.commit()
        left_out = Counter(reader.unfit.counts) + _unfit_in(sources, writer)
        report = replace(report_of(writer, before), gone=gone, left_out=dict(left_out))
    if not report.clips:
        reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise DataError(f"{annotations}: no clip could be stored: {reasons or 'it has no records'}")
    return report


def _sources(clips: Sequence[Annotation]) -> list[_Annotated]:
    """The files in the order in which they are named first, each with all its clips."""
    by_name: dict[str, list[Annotation]] = {}
    for clip in clips:
        by_name.setdefault(clip.name, []).append(clip)
    sources = []
    for name, same in by_name.items():
        try:
            stat = same[0].file.stat()
        except OSError as error:
            raise DataError(f"{same[0].file}: cannot be read ({error.strerror})") from error
        said = [[list(clip.caption.texts), dict(clip.caption.scores), clip.frames, clip.crop] for clip in same]
        place = same[0].file, name, stat.st_size, stat.st_mtime_ns, said_digest(said)
        sources.append(_Annotated(*place, tuple(same)))
    return sources


def _store(source: _Annotated, examined: Examined | Crashed, writer: ShardWriter) -> None:
    """Adds the clips of one file, and a journal line that says so and which records do not fit."""
    line = writer.sources.get(source.name)
    if isinstance(examined, Crashed):
        examined = Examined(source.sha256(), reason="the decoder crashed on it")
    if line is not None and examined.unchanged:
        writer.note(line | source.identity)
        return
    if line is not None and line["clips"]:
        log.warning(
            "%s: has changed since it was stored; its new clips are added, the old ones stay", printable(source.name)
        )
    data, reason = _bytes(source, examined)
    number, records, damaged = writer.next_number, list[dict[str, Any]](), list[str]()
    if data is None or examined.clip is None:
        damaged = [f"{_BROKEN}: {clip.place}: {reason}" for clip in source.clips]
    else:
        for clip in source.clips:
            try:
                records.append(_record(clip, examined.clip.info))
            except UnfitError as error:
                damaged.append(f"{error.reason}: {clip.place}")
    if records and data is not None and examined.clip is not None:
        stem = re.sub(r"[^\w-]+", "_", source.path.stem, flags=re.ASCII)[:60]
        (key, record), *others = [(f"{number:06d}-{stem}-{at:02d}", record) for at, record in enumerate(records)]
        writer.add(key, examined.clip.suffix, data, record, others)
    if damaged:
        reason = f"{len(damaged)} of its {len(source.clips)} clips left out ({damaged[0]})"
        log.warning("%s: %s", printable(source.name), printable(reason))
    state = {"sha256": examined.sha256, "caption": source.digest, "number": number, "clips": len(records)}
    end = {"next": len(source.clips), "damaged": damaged, "done": True, "reason": reason}
    writer.note(source.identity | state | end)


def _bytes(source: _Annotated, examined: Examined) -> tuple[bytes | None, str]:
    """The bytes to store of a file, or none and why."""
    if examined.clip is None or examined.clip.data:
        return (None, examined.reason) if examined.clip is None else (examined.clip.data, "")
    try:
        data = source.path.read_bytes()
    except OSError as error:
        return None, f"cannot be read ({error.strerror})"
    if hashlib.sha256(data).hexdigest() != examined.sha256:
        return None, "has changed while it was read"
    return data, ""


def _record(clip: Annotation, info: VideoInfo) -> dict[str, Any]:
    """The record of a clip, with the sizes of its part of the file. Raises UnfitError where there is no such part."""
    part = clip.part(info)
    start = part.first / info.fps if info.fps else 0.0
    record = record_of(part.info(info, clip.name), start, clip.name, clip.caption)
    if part.cut is not None:
        record["cut"] = list(part.cut)
    if part.crop is not None:
        record["crop"] = list(part.crop)
    return record


def _unfit_in(sources: Sequence[Source], writer: ShardWriter) -> Counter[str]:
    """The records of these files that do not fit, by their reason: in this run and earlier ones."""
    lines = (writer.sources.get(source.name) for source in sources)
    return Counter(said.partition(": ")[0] for line in lines if line is not None for said in line["damaged"])
