"""A folder of videos and images -> WebDataset shards of clips that are known to decode.

`write_shards` reads files; `write_rendered` takes clips that the program makes. Both can be run again with the same
arguments: what is stored stays untouched, a run that was cut off goes on where it stopped. Formats: data/README.md.
"""

import itertools
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from osp.checks import check_number
from osp.data.media.clips import Clip, CutSettings, Examined, cut_decoded, examine, extract
from osp.data.media.folder import media_files
from osp.data.media.limits import DEFAULT_LIMITS, Limits
from osp.data.media.pieces import Piece, sharing
from osp.data.media.video import encode_video, probe
from osp.data.shards.captions import Caption, Captions, SideCars, read_captions
from osp.data.shards.index import tars_below
from osp.data.shards.stored import (
    ShardReport,
    Source,
    caption_digest,
    check_same_words,
    mark_gone,
    record_of,
    report_of,
)
from osp.data.shards.workers import Crashed, Workers, default_workers
from osp.data.shards.writer import ShardWriter
from osp.data.summary import Tally
from osp.documents import printable
from osp.errors import DataError, UsageError

log = logging.getLogger(__name__)

_WORDS = "captions or scores than captions= or the files beside them"
_OTHER_WORDS = "`osp shards input={} captions=FILE output=OTHER` changes them, or use another output folder"
_KEY = re.compile(r"[\w-]{1,90}", re.ASCII)


@dataclass(frozen=True)
class _Captioned(Source):
    """A source with its captions."""

    caption: Caption


def write_shards(
    videos: Path,
    output: Path,
    *,
    captions: Path | None = None,
    clip_seconds: float = 10.0,
    min_frames: int = 1,
    shard_clips: int = 1000,
    shard_bytes: int = 1_000_000_000,
    workers: int | None = None,
    watch: Callable[[int, int], None] = lambda done, files: None,
    limits: Limits = DEFAULT_LIMITS,
    drop_gone: bool = False,
) -> ShardReport:
    """Write every video and image below `videos` into WebDataset shards in `output`.

    Videos longer than `clip_seconds` are cut (see `media.clips`). Each clip is decoded before it is stored; what is
    damaged is left out, told in one log line a source, and listed in the index. Captions come from `captions` (see
    `osp.data.shards.captions`) or from files beside the videos.

    Run again, it does only what is new: files are known by name, size and modification time, then by content.

    Args:
        min_frames: shorter videos are left out.
        shard_clips, shard_bytes: a shard is closed before it would have more clips or media bytes.
        workers: processes, None: one a core; 0: all in this process, where a decoder's crash ends the run.
        watch: told after each file how many of the new ones are done, and how many there are.
        limits: what one file may cost; one beyond them is left out.
        drop_gone: readers are to leave out the clips of sources that are no longer in `videos`, until these are back.

    Raises:
        UsageError: settings out of range, no such folder, or `output` was begun with other settings or captions.
        DataError: nothing in `videos` could be stored.
    """
    check_number("clip_seconds", clip_seconds, above=0)
    check_number("min_frames", min_frames, 1, whole=True)
    check_number("workers", workers, 0, whole=True, null="one a core")
    workers = default_workers() if workers is None else workers
    if not videos.is_dir():
        raise UsageError(f"{videos}: no such folder of videos")
    texts = Captions(side_cars=SideCars(limits)) if captions is None else read_captions(captions, videos, limits)
    sources = _sources(videos, output, texts)
    settings = {"clip_seconds": float(clip_seconds), "min_frames": min_frames}
    cutting = CutSettings(clip_seconds, min_frames, limits)
    with ShardWriter(output, settings, shard_clips, shard_bytes) as writer:
        check_same_words(output, sources, writer.sources, _WORDS, _OTHER_WORDS.format(output))
        before, gone = writer.clips, mark_gone(videos, sources, writer, drop_gone)
        todo = [source for source in sources if not source.is_done(writer.sources.get(source.name))]
        if todo:
            log.info("%s: %d files, %d of them new", videos, len(sources), len(todo))
            with Workers(workers, preload=["osp.data.media.clips"]) as pool:
                _store_all(todo, cutting, writer, pool, watch)
        writer.commit()
        report = report_of(writer, before, len(texts.missing))
        report = replace(report, gone=gone, left_out=texts.side_cars.passed_over.counts)
    if not report.clips:
        name, reason = report.skipped[0]
        raise DataError(f"{videos}: none of its {len(sources)} files could be stored (first, {name}: {reason})")
    return report


def write_rendered(
    clips: Iterable[tuple[str, Tensor, Mapping[str, Any]]],
    output: Path,
    *,
    settings: Mapping[str, Any] | None = None,
    lossless: bool = False,
    shard_clips: int = 1000,
    shard_bytes: int = 1_000_000_000,
) -> ShardReport:
    """Write clips that the program makes into shards: (key, video uint8 `C T H W`, record with at least `fps`).

    The record may bring `caption`, `scores` and keys of its own; the sizes are filled in here. A folder that holds n of
    the clips goes on after them: a sequence is then indexed from n on, any other iterable is run through.

    Args:
        settings: what the clips depend on (seed, size, ...); a folder that was begun with others is refused.
        lossless: H.264 RGB that gives the same values back, else H.264 at CRF 14.

    Raises:
        UsageError: a key that is no plain name, or that comes twice; other settings; a record without `fps`.
    """
    described = {"rendered": True, "lossless": lossless, **(settings or {})}
    with ShardWriter(output, described, shard_clips, shard_bytes) as writer:
        before = writer.clips
        keys: set[str] = set()
        fresh = (
            (clips[number] for number in range(before, len(clips)))
            if isinstance(clips, Sequence)
            else itertools.islice(clips, before, None)
        )
        for key, video, record in fresh:
            if not _KEY.fullmatch(key) or key in keys:
                raise UsageError(f"key {key!r}: must be new, and made of at most 90 letters, digits, - and _")
            if "fps" not in record:
                raise UsageError(f"key {key!r}: its record has no fps")
            keys.add(key)
            data = encode_video(video, record["fps"], lossless=lossless, threads=1)
            info = probe(data, key, decode=True, threads=1)
            text = record.get("caption", "")
            caption = Caption((text,) if text else (), record.get("scores", {}))
            writer.add(key, "mp4", data, {**record, **record_of(info, 0.0, record.get("source", key), caption)})
        writer.commit()
        return report_of(writer, before)


def _sources(folder: Path, output: Path, captions: Captions) -> list[_Captioned]:
    """The media files below a folder, but not those in the output folder."""
    found: list[_Captioned] = []
    for path in _media_files(folder, output, captions.side_cars.passed_over):
        stat = path.stat()
        caption = captions.find(path) or Caption()
        name = path.relative_to(folder).as_posix()
        found.append(_Captioned(path, name, stat.st_size, stat.st_mtime_ns, caption_digest(caption), caption))
    captions.side_cars.passed_over.warn(folder)
    return found


def _media_files(folder: Path, output: Path, tally: Tally) -> list[Path]:
    try:
        return media_files(folder, output, tally)
    except DataError as error:
        tars, packed = tars_below(folder)
        if not (tars or packed):
            raise
        kind, first = "tars" if tars else "compressed tars", printable((tars or packed)[0].relative_to(folder))
        decompressed = "" if tars else "decompress them with gunzip, bunzip2, unxz or unzstd, and "
        raise DataError(
            f"{folder}: holds no videos or images, but {len(tars or packed)} {kind} (first: {first}); tars are shards "
            f"already: {decompressed}give their folder to `osp train data.train.path=`, "
            "`osp cache input=` or `osp eval input=`, or unpack them with tar -xf"
        ) from error


def _store_all(
    todo: Sequence[_Captioned],
    cutting: CutSettings,
    writer: ShardWriter,
    pool: Workers,
    watch: Callable[[int, int], None],
) -> None:
    calls = ((examine, source.path, cutting, source.known(writer.sources)) for source in todo)
    for done, (source, examined) in enumerate(zip(todo, pool.in_order(calls), strict=True), start=1):
        _store(source, examined, cutting, writer, pool)
        watch(done, len(todo))


def _store(
    source: _Captioned, examined: Examined | Crashed, cutting: CutSettings, writer: ShardWriter, pool: Workers
) -> None:
    """Adds the clips of one source, and a journal line that says so."""
    line = writer.sources.get(source.name)
    if isinstance(examined, Crashed):
        examined = Examined(source.sha256(), reason="the decoder crashed on it")
    identity = source.identity
    if line is not None and examined.unchanged:
        writer.note(line | identity)  # only its modification time has changed
        return
    clips, next_piece, damaged = 0, 0, list[str]()
    number = writer.next_number
    if line is not None and not line["done"] and line["sha256"] == examined.sha256:
        number, clips, next_piece, damaged = line["number"], line["clips"], line["next"], list(line["damaged"])
    elif line is not None and line["clips"]:
        log.warning(
            "%s: has changed since it was stored; its new clips are added, the old ones stay", printable(source.name)
        )
    stem = re.sub(r"[^\w-]+", "_", source.path.stem, flags=re.ASCII)[:60]

    def note(done: bool, reason: str = "") -> None:
        state = {"sha256": examined.sha256, "caption": source.digest, "number": number, "clips": clips}
        new = identity | state | {"next": next_piece, "damaged": list(damaged), "done": done, "reason": reason}
        if {**new, "number": 0} != {**(line or {}), "number": 0}:
            writer.note(new)

    for outcome in _outcomes(source.path, examined, cutting, next_piece, pool):
        if isinstance(outcome, Clip):
            record = record_of(outcome.info, outcome.start, source.name, source.caption)
            writer.add(f"{number:06d}-{stem}-{next_piece:02d}", outcome.suffix, outcome.data, record)
            clips += 1
        else:
            reason = outcome if isinstance(outcome, str) else "the decoder crashed on it"
            place = f"at {examined.pieces[next_piece].start:.1f} s" if examined.pieces else f"clip {next_piece}"
            damaged.append(f"{place}: {reason}")
        next_piece += 1
        if examined.clip is None:
            note(done=False)
    reason = examined.reason
    if damaged:
        reason = f"{len(damaged)} of its {next_piece} clips left out ({damaged[0]})"
    if reason:
        log.warning("%s: skipped, %s" if not clips else "%s: %s", printable(source.name), printable(reason))
    elif examined.note:
        log.warning("%s: %s", printable(source.name), examined.note)
    note(done=True, reason=reason)


def _outcomes(
    path: Path, examined: Examined, cutting: CutSettings, after: int, pool: Workers
) -> Iterator[Clip | str | Crashed]:
    """Each clip of a source in its order, from number `after` on, or the reason why there is none.

    Pieces that one decode serves are cut by one process; the others by all of them.
    """
    if examined.clip is not None:
        yield examined.clip
        return
    if examined.unplanned:
        yield from pool.stream(cut_decoded, path, cutting, after)
        return
    runs = [*sharing(examined.pieces[after:])]
    for together, group in itertools.groupby(runs, lambda run: len(run) > 1):
        if not together:
            for outcomes in pool.in_order((_extracted, path, run, cutting.limits) for run in group):
                yield from [outcomes] if isinstance(outcomes, Crashed) else outcomes
            continue
        for run in group:
            left = len(run)
            for outcome in pool.stream(extract, path, run, cutting.limits):
                yield outcome
                left -= 1
            yield from [Crashed()] * left  # those after a crash lean on the same frames


def _extracted(path: Path, run: Sequence[Piece], limits: Limits) -> list[Clip | str]:
    return [*extract(path, run, limits)]
