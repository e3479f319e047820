"""Other captions for shards that exist: the videos are copied byte for byte, and neither decoded nor encoded."""

import hashlib
import itertools
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from osp.data.media.limits import DEFAULT_LIMITS, Limits
from osp.data.shards.captions import Caption, caption_rows
from osp.data.shards.entry import ClipEntry
from osp.data.shards.index import INDEX_NAME, load_index, read_index
from osp.data.shards.stored import ShardReport, report_of
from osp.data.shards.tar import to_json
from osp.data.shards.writer import ShardWriter
from osp.data.summary import Tally
from osp.documents import printable
from osp.errors import UsageError

log = logging.getLogger(__name__)


def write_recaptioned(
    shards: Path,
    captions: Path,
    output: Path,
    *,
    shard_clips: int = 1000,
    shard_bytes: int = 1_000_000_000,
    watch: Callable[[int, int], None] = lambda done, clips: None,
    limits: Limits = DEFAULT_LIMITS,
) -> ShardReport:
    """Write the clips of a shard folder into `output`, with the captions and scores that a captions file has for them.

    A row names a clip by its key, or all clips of a source by the source's name; a row for the key goes before. Its
    texts take the place of the stored ones (an empty text leaves none), its scores are added to the stored ones or
    replace those of the same name. Clips that no row names stay as they are. Clips whose texts differ from the stored
    ones are marked, so that runs on the former captions, and features made of them, are told apart.

    Readers refuse `output` until all of it is written; the same command goes on after it was cut off.

    Raises:
        UsageError: `shards` was not written by `osp shards`, `output` was begun otherwise, or no row names a clip.
        DataError: the captions cannot be read, or a clip's bytes are damaged.
    """
    if load_index(shards) is None:
        raise UsageError(f"{shards}: has no {INDEX_NAME}, so that `osp shards` cannot change its captions")
    if os.path.realpath(shards) == os.path.realpath(output):
        raise UsageError(f"output={output}: is the folder whose captions are changed; give a new one")
    passed_over = Tally()
    rows = dict(caption_rows(captions, limits, passed_over))
    passed_over.warn(captions)
    entries = read_index(shards, limits)
    missing = rows.keys() - {name for entry in entries for name in _names(entry)}
    if missing:
        log.warning(
            "%s: %d of the %d clips and sources that it names are not in %s (first: %s)",
            *(captions, len(missing), len(rows), shards, printable(min(missing))),
        )
    if len(missing) == len(rows):
        raise UsageError(
            f"captions={captions}: names no clip of {shards}; a row names a clip by its key or its source, as the "
            ".jsonl beside the tars has them"
        )
    records = [_record(entry, rows) for entry in entries]
    settings = {"captions_of": _digest(entries, records)}
    with ShardWriter(output, settings, shard_clips, shard_bytes, expected=len(entries)) as writer:
        before = writer.clips
        _copy(entries, records, writer, watch)
        writer.commit()
        report = report_of(writer, before, len(missing))
    changed = sum(said != dict(entry.record) for entry, said in zip(entries, records, strict=True))
    return replace(report, changed=changed, left_out=passed_over.counts)


def _names(entry: ClipEntry) -> tuple[str, str]:
    return entry.key, str(entry.record.get("source", ""))


def _record(entry: ClipEntry, rows: Mapping[str, Caption]) -> dict[str, Any]:
    """The record of a clip with the caption that a row has for it, if one has."""
    caption = next((rows[name] for name in _names(entry) if name in rows), None)
    record = dict(entry.record)
    if caption is None:
        return record
    record |= {"captions": []} | caption.as_record()
    if not record["captions"]:
        del record["captions"]
    record["scores"] = {**(entry.record.get("scores") or {}), **caption.scores}
    if any(record.get(key) != entry.record.get(key) for key in ("caption", "captions")):
        record["recaptioned"] = True
    return record


def _digest(entries: list[ClipEntry], records: list[dict[str, Any]]) -> str:
    """A digest of the clips that a folder is made of, and of their new records."""
    digest = hashlib.sha256()
    for entry, record in zip(entries, records, strict=True):
        digest.update(to_json([entry.key, entry.size, entry.crc32, record]))
    return digest.hexdigest()[:16]


def _copy(
    entries: list[ClipEntry],
    records: list[dict[str, Any]],
    writer: ShardWriter,
    watch: Callable[[int, int], None],
) -> None:
    """Adds the clips that the folder does not have yet; those that share bytes together."""
    done, total = writer.clips, len(entries)  # a shard is complete after a whole group only
    pairs = itertools.islice(zip(entries, records, strict=True), done, None)
    for _, group in itertools.groupby(pairs, lambda pair: (pair[0].tar, pair[0].offset)):
        (entry, record), *others = group
        suffix = PurePosixPath(entry.member).suffix.removeprefix(".")
        writer.add(entry.key, suffix, entry.read(), record, [(other.key, said) for other, said in others])
        done += 1 + len(others)
        watch(done, total)
