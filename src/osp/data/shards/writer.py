"""A folder of shards that is being written: what is committed is whole, whatever happens to the writer.

A shard is written under a temporary name and renamed when it is complete; it counts once `index.json` lists it, and
that file is replaced in one step. `sources.jsonl` is a journal of what became of every source; the index says how many
bytes of it count. So a run that is killed at any moment loses the open shard and nothing else.
"""

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from osp.checks import check_number
from osp.data.shards.index import (
    INDEX_FORMAT,
    INDEX_NAME,
    INDEX_VERSION,
    WRITTEN_FORM,
    ListingLines,
    load_index,
    write_index,
)
from osp.data.shards.tar import TarShard, to_json
from osp.documents import COUNT, check_form
from osp.errors import DataError, UsageError
from osp.files import sync

_JOURNAL = "sources.jsonl"
_LOCK = ".lock"
_SHARD = re.compile(r"shard-\d{6,}\.(tar|jsonl)")
_JOURNAL_BYTES = 1 << 33
_JOURNAL_FORM = {
    "source": str,
    "size": COUNT,
    "mtime_ns": int,
    "sha256": str,
    "caption": str,
    "number": COUNT,
    "clips": COUNT,
    "next": COUNT,
    "damaged": [str],
    "done": bool,
    "reason": str,
}


class ShardWriter:
    """Appends clips to a shard folder; a context that holds the folder's lock.

    Args:
        folder: made if it does not exist.
        settings: what decides the content of the clips; a folder that was begun with others is refused.
        shard_clips, shard_bytes: a shard is closed before it would have more clips or bytes of media than these.
        expected: readers refuse a new folder until it has so many clips.

    Raises:
        UsageError: another writer is at work here, other settings were used, or the folder holds foreign tars.
    """

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], shard_clips: int, shard_bytes: int, expected: int = 0
    ) -> None:
        check_number("shard_clips", shard_clips, 1, whole=True)
        check_number("shard_bytes", shard_bytes, 1, whole=True)
        self.folder = folder
        self.index: dict[str, Any] = {}
        self.sources: dict[str, dict[str, Any]] = {}  # the journal's last line about each source
        self._settings: dict[str, Any] = json.loads(json.dumps(dict(settings)))
        self._shard_clips, self._shard_bytes, self._expected = shard_clips, shard_bytes, expected
        self.next_number = 0  # that no source has yet
        self._lines: list[dict[str, Any]] = []  # of the journal, to be committed with the next shard
        self._underway: dict[str, Any] | None = None
        self._shard: TarShard | None = None
        self._sums: dict[str, float] = {}  # of the open shard
        self._journal = hashlib.sha256()  # of the journal, as far as it counts
        self._lock: BinaryIO | None = None

    def __enter__(self) -> Self:
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / _LOCK, "ab")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise UsageError(f"{self.folder}: another run is writing shards here; wait for it or stop it") from error
        try:
            self._load()
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shard is not None:
            self._shard.discard()
        if self._lock is not None:
            self._lock.close()

    @property
    def clips(self) -> int:
        """Committed clips."""
        return int(self.index["clips"])

    @property
    def dropped(self) -> list[str]:
        """The sources whose clips readers leave out."""
        return [*self.index.get("dropped", ())]

    def drop(self, sources: list[str]) -> None:
        """Have readers leave out the clips of these sources, and of no others."""
        if sorted(sources) != sorted(self.dropped):
            index = {**self.index, "dropped": sorted(sources)}
            with self._writing(self.folder / INDEX_NAME):
                write_index(self.folder, index)
            self.index = index

    def add(
        self,
        key: str,
        suffix: str,
        data: bytes,
        record: Mapping[str, Any],
        sharing: Sequence[tuple[str, Mapping[str, Any]]] = (),
    ) -> None:
        """Appends one sample: KEY.json, then KEY.SUFFIX with the media bytes; and further clips of the same bytes.

        The clips that are `sharing` bytes lie in one shard, also if there are more of them than a shard may have.
        """
        shard, clips = self._shard, 1 + len(sharing)
        if shard is not None and (
            len(shard.lines) + clips > self._shard_clips or shard.media_bytes + len(data) > self._shard_bytes
        ):
            self.commit()
        path = self.folder / f"shard-{len(self.index['shards']):06d}.tar"
        with self._writing(path):
            if self._shard is None:
                self._shard = TarShard(path)
                self._sums = {"clips": 0, "images": 0, "seconds": 0.0, "captioned": 0}
            self._shard.add(key, suffix, data, record, sharing)
        for said in (record, *(said for _, said in sharing)):
            self._sums["clips"] += 1
            self._sums["images"] += said.get("kind") == "image"
            self._sums["seconds"] += said.get("duration", 0.0)
            self._sums["captioned"] += bool(said.get("caption"))

    def note(self, line: dict[str, Any]) -> None:
        """Note the outcome of a source (`source`, `number`, `done`, `reason`, ...); it counts from the next commit on.

        A line with `done` false tells how far a source has come: only the last one before a commit is kept.
        """
        self.next_number = max(self.next_number, line["number"] + 1)
        if line["done"]:
            self._lines.append(line)
            self._underway = None
        else:
            self._underway = line

    def commit(self) -> None:
        """Closes the open shard and makes all that was added and noted count; nothing to commit, nothing written."""
        lines = self._lines if self._underway is None else [*self._lines, self._underway]
        if self._shard is None and not lines:
            return
        index = dict(self.index)
        if self._shard is not None:
            with self._writing(self._shard.path):
                index["shards"] = [*index["shards"], self._shard.close()]
            for name, value in self._sums.items():
                index[name] = round(index[name] + value, 6)
            self._shard = None
        with self._writing(self.folder / _JOURNAL):
            index["sources"] = self._append(lines)
        with self._writing(self.folder / INDEX_NAME):
            reasons = {entry["source"]: entry["reason"] for entry in index["skipped"]}
            for line in lines:
                if line["done"]:
                    reasons.pop(line["source"], None)
                    if line["reason"]:
                        reasons[line["source"]] = line["reason"]
            index["skipped"] = [{"source": source, "reason": reason} for source, reason in reasons.items()]
            write_index(self.folder, index)
        self.index = index
        self.sources.update((line["source"], line) for line in lines)
        self._lines = []

    def _append(self, lines: list[dict[str, Any]]) -> dict[str, Any]:
        """Appends to the journal; its name, new length and checksum."""
        content, length = b"".join(to_json(line) + b"\n" for line in lines), int(self.index["sources"]["bytes"])
        if lines:
            with open(self.folder / _JOURNAL, "ab") as file:
                file.write(content)
                sync(file)
                length = file.tell()
        self._journal.update(content)
        return {"file": _JOURNAL, "bytes": length, "sha256": self._journal.hexdigest()}

    def _load(self) -> None:
        """Reads what earlier runs committed and removes what a killed one left."""
        index = load_index(self.folder)
        if index is None:
            foreign = next(self.folder.glob("*.tar"), None)
            if foreign is not None:
                raise UsageError(f"{self.folder}: holds tars that OSP did not write ({foreign.name}); use a new folder")
            index = {"format": INDEX_FORMAT, "version": INDEX_VERSION, "clips": 0, "images": 0, "seconds": 0.0}
            index |= {"captioned": 0, "settings": self._settings, "sources": {"file": _JOURNAL, "bytes": 0}}
            index |= {"shards": [], "skipped": []} | ({"expected": self._expected} if self._expected else {})
            with self._writing(self.folder / INDEX_NAME):
                write_index(self.folder, index)
        check_form(index, WRITTEN_FORM, str(self.folder / INDEX_NAME))
        self._check_settings(index["settings"])
        self.index = index
        with self._writing():
            self._read_journal(index["sources"])
            listed = {name for shard in index["shards"] for name in (shard["file"], f"{shard['file'][:-4]}.jsonl")}
            for path in self.folder.iterdir():
                unlisted = _SHARD.fullmatch(path.name) and path.name not in listed
                if unlisted or (path.name.startswith(".") and path.name.endswith(".part")):
                    path.unlink()

    def _check_settings(self, written: Mapping[str, Any]) -> None:
        if written.keys() != self._settings.keys():
            raise UsageError(
                f"{self.folder}: holds shards of another kind (written with {', '.join(written)}; "
                f"now {', '.join(self._settings)}); use another output folder"
            )
        for name, value in self._settings.items():
            if written.get(name) != value:
                raise UsageError(
                    f"{self.folder}: its shards were written with {name}={written.get(name)}, now {name}={value}; "
                    f"give {name}={written.get(name)} to go on with it, or another output folder"
                )

    def _read_journal(self, listed: Mapping[str, Any]) -> None:
        """Reads as much of the journal as the index says, and removes what a killed run appended."""
        path, length = self.folder / _JOURNAL, listed["bytes"]
        if not length:
            path.unlink(missing_ok=True)
            return
        if path.stat().st_size > length:
            os.truncate(path, length)
        if (found := path.stat().st_size) < length:
            raise DataError(f"{path}: is cut short ({found} of {length} bytes); write into a new folder")
        lines = ListingLines(path, _JOURNAL_BYTES)
        if listed.get("sha256", lines.sha256) != lines.sha256:
            raise DataError(f"{path}: damaged, it is not as it was written; write into a new folder")
        self._journal.update(lines.text.encode())
        for place, entry in lines:
            check_form(entry, _JOURNAL_FORM, place)
            self.sources[entry["source"]] = entry
            self.next_number = max(self.next_number, entry["number"] + 1)

    @contextmanager
    def _writing(self, path: Path | None = None) -> Iterator[None]:
        """A block in which an error of the disk is one line that names the file."""
        try:
            yield
        except OSError as error:
            raise DataError(f"{error.filename or path or self.folder}: cannot be written ({error.strerror})") from error
