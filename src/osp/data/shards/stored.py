"""Sources of a shard folder: which are done, gone or described otherwise by now; and the report of a run."""

import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from osp.data.media.video import VideoInfo
from osp.data.shards.captions import Caption
from osp.data.shards.tar import to_json
from osp.data.shards.writer import ShardWriter
from osp.data.summary import Summary
from osp.documents import printable
from osp.errors import UsageError
from osp.files import file_digest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardReport:
    """The content of a shard folder after a run.

    All but `new_clips`, `captions_missing`, `gone` and `left_out` count all runs together.
    """

    clips: int
    new_clips: int
    images: int
    shards: int
    seconds: float  # of video
    captioned: int
    captions_missing: int  # files that the captions file names and that do not exist
    skipped: tuple[tuple[str, str], ...]  # (source, reason), also sources of which some clips are left out
    gone: int = 0  # stored sources that are no longer in the input folder
    left_out: Mapping[str, int] = field(default_factory=dict)  # other files, side-cars, captions, records, by reason
    changed: int = 0  # clips that got other captions

    def summary(self, place: str) -> Summary:
        """The same for people, in one line."""
        left_out = {"files that are left out, or of which some clips are": len(self.skipped), **self.left_out}
        return Summary(place, self.clips, left_out, self.captioned)


def report_of(writer: ShardWriter, before: int, captions_missing: int = 0) -> ShardReport:
    """The report of a run that found `before` clips in the folder."""
    index = writer.index
    return ShardReport(
        clips=index["clips"],
        new_clips=index["clips"] - before,
        images=index["images"],
        shards=len(index["shards"]),
        seconds=index["seconds"],
        captioned=index["captioned"],
        captions_missing=captions_missing,
        skipped=tuple((entry["source"], entry["reason"]) for entry in index["skipped"]),
    )


@dataclass(frozen=True)
class Source:
    """A file that clips are made of.

    Args:
        name: what shards call it.
        digest: of what is said about it (captions, scores, parts), which stored clips cannot change.
    """

    path: Path
    name: str
    size: int
    mtime_ns: int
    digest: str

    @property
    def identity(self) -> dict[str, Any]:
        """The keys of its journal line that say which file it is."""
        return {"source": self.name, "size": self.size, "mtime_ns": self.mtime_ns}

    def is_done(self, line: Mapping[str, Any] | None) -> bool:
        """Whether its journal line says that nothing is left to do, by size and modification time."""
        return (
            line is not None
            and line["done"]
            and (line["size"], line["mtime_ns"]) == (self.size, self.mtime_ns)
            and bool(line["sha256"])  # a file that could not even be read is tried again
        )

    def known(self, lines: Mapping[str, Mapping[str, Any]]) -> str:
        """The content of a source that needs no second look: what could be stored of it is."""
        line = lines.get(self.name)
        return line["sha256"] if line is not None and line["done"] else ""

    def sha256(self) -> str:
        """The digest of its content; empty if it cannot be read."""
        try:
            return file_digest(self.path)
        except OSError:
            return ""


def caption_digest(caption: Caption) -> str:
    """The digest of the captions and scores of a source."""
    further = [list(caption.texts)] if len(caption.texts) > 1 else []
    return said_digest([caption.text, dict(caption.scores), *further])


def said_digest(said: object) -> str:
    """The digest of plain values that are said about a source."""
    return hashlib.sha256(to_json(said)).hexdigest()[:16]


def mark_gone(place: Path, sources: Iterable[Source], writer: ShardWriter, drop: bool) -> int:
    """How many sources have stored clips and are no longer in their place; one line says so."""
    there = {source.name for source in sources}
    stored = [name for name, line in writer.sources.items() if line["clips"]]
    gone = [name for name in stored if name not in there]
    writer.drop(gone if drop else [name for name in gone if name in writer.dropped])
    if gone:
        log.warning(
            "%s: %d of %d stored sources are gone from it (first: %s); their clips %s",
            place,
            len(gone),
            len(stored),
            printable(gone[0]),
            "are left out when the shards are read" if drop else "stay, drop_gone=true leaves them out",
        )
    return len(gone)


def check_same_words(
    output: Path, sources: Iterable[Source], lines: Mapping[str, Mapping[str, Any]], words: str, mend: str
) -> None:
    """Raise UsageError where other `words` are stored than now said: silence would leave the user with the old ones."""
    stored = [source for source in sources if lines.get(source.name, {}).get("clips")]
    changed = [source.name for source in stored if lines[source.name]["caption"] != source.digest]
    if changed:
        raise UsageError(
            f"{output}: {len(changed)} of its {len(stored)} sources are stored with other {words} now say "
            f"(first: {printable(changed[0])}); {mend}"
        )


def record_of(info: VideoInfo, start: float, source: str, caption: Caption) -> dict[str, Any]:
    """The record of a clip that holds `info`, from `start` seconds of its source on."""
    measured = {name: round(value, 6) if isinstance(value, float) else value for name, value in asdict(info).items()}
    return {
        **{name: measured[name] for name in ("frames", "fps", "width", "height", "duration")},
        **caption.as_record(),
        "source": source,
        "start": round(start, 6),
        "kind": info.kind,
        "scores": dict(caption.scores),
    }
