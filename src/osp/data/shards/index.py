"""What a folder of shards holds: `read_index` lists its clips, and each entry reads its own bytes.

The format is described in data/README.md. Folders that `osp shards` wrote have an `index.json`; any other folder of
WebDataset tars (video2dataset's, for one) is listed by walking the tar headers, and a folder of plain videos by name.
"""

import json
import logging
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osp.data.media.folder import IMAGE_SUFFIXES, VIDEO_SUFFIXES, media_files
from osp.errors import DataError

log = logging.getLogger(__name__)

INDEX_NAME = "index.json"
INDEX_FORMAT = "osp-shards"
INDEX_VERSION = 1

_RECORD_TYPES: Mapping[str, type | tuple[type, ...]] = {
    "frames": int,
    "fps": (int, float),
    "width": int,
    "height": int,
    "duration": (int, float),
    "caption": str,
    "source": str,
    "start": (int, float),
    "kind": str,
    "scores": dict,
}


@dataclass(frozen=True)
class ClipEntry:
    """One sample of a shard folder: where its media bytes lie, and its record. Without a `member`, `tar` is the media
    file itself.
    """

    key: str
    tar: Path
    member: str
    offset: int  # of the media member's data in the tar, bytes
    size: int  # bytes
    record: Mapping[str, Any]

    def source(self) -> Path | bytes:
        """What `osp.data.media.video` reads the clip from. Raises as `read`."""
        return self.read() if self.member else self.tar

    def read(self) -> bytes:
        """The media file's bytes. Raises DataError if the tar is gone or ends too early."""
        try:
            with open(self.tar, "rb") as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise DataError(f"{self.tar}: cannot be read ({error.strerror}); {_MEND}") from error
        if len(data) != self.size:
            raise DataError(f"{self.tar}: ends inside {self.member} ({len(data)} of {self.size} bytes); {_MEND}")
        return data


_MEND = "copy the shard again, or write the folder anew with `osp shards input=... output=...`"


def load_index(folder: Path) -> dict[str, Any] | None:
    """The parsed `index.json` of a folder, None if it has none. Raises DataError for one that is not ours."""
    index = read_index_file(folder, "OSP shards", INDEX_FORMAT, INDEX_VERSION, "osp shards input=... output=...")
    if index is not None and not isinstance(index.get("shards"), list):
        raise DataError(f"{folder / INDEX_NAME}: a damaged index; {_MEND}")
    return index


def read_index_file(folder: Path, what: str, form: str, version: int, command: str) -> dict[str, Any] | None:
    """The parsed `index.json` of a folder of `what`, None if it has none.

    Raises DataError for a file that is no index of this form and version; `command` writes one.
    """
    path = folder / INDEX_NAME
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable index ({error}); write the folder anew with `{command}`") from error
    if not isinstance(index, dict) or index.get("format") != form:
        raise DataError(f"{path}: not an index of {what} (format {form!r} expected); make one with `{command}`")
    if index.get("version") != version:
        raise DataError(
            f"{path}: version {index.get('version')!r}, this OSP reads version {version}; "
            f"write the folder anew with `{command}`"
        )
    return index


def read_index(folder: str | Path) -> list[ClipEntry]:
    """All clips of a shard folder, in shard order.

    A folder without `index.json` is read as foreign WebDataset shards: the tars are listed by their headers, records
    then hold what their JSON or text members tell (`caption` at least where there is one) and `kind`. In a folder
    without tars each video and image below it is a clip.

    Raises:
        DataError: no such folder, no clips in it, or a listed shard is missing or cut short.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; it should hold videos, or shards of `osp shards`")
    index = load_index(folder)
    if index is not None:
        entries = [entry for shard in index["shards"] for entry in _listed_shard(folder, shard)]
    else:
        tars = sorted(folder.glob("*.tar"))
        if not tars:
            return [_plain_file(folder, path) for path in media_files(folder)]
        entries = [entry for tar in tars for entry in _scan_tar(tar)]
    if not entries:
        raise DataError(
            f"{folder}: its shards hold no clips; write them with `osp shards input=VIDEOS output={folder}`"
        )
    return entries


def _listed_shard(folder: Path, shard: Mapping[str, Any]) -> list[ClipEntry]:
    """The entries of one shard that index.json lists, from the `.jsonl` beside it."""
    try:
        tar = folder / shard["file"]
        clips, expected = int(shard["clips"]), int(shard["bytes"])
        found = tar.stat().st_size
        lines = tar.with_suffix(".jsonl").read_text(encoding="utf-8").split("\n")[:-1]
        entries = [listed_entry(tar, json.loads(line)) for line in lines]
    except OSError as error:
        raise DataError(f"{error.filename}: {INDEX_NAME} needs it ({error.strerror}); {_MEND}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder / str(shard)}: damaged listing of a shard ({error!r}); {_MEND}") from error
    if found != expected:
        raise DataError(f"{tar}: has {found} bytes, {INDEX_NAME} says {expected}; {_MEND}")
    if len(entries) != clips:
        raise DataError(f"{tar.with_suffix('.jsonl')}: lists {len(entries)} clips, {INDEX_NAME} says {clips}; {_MEND}")
    return entries


def _plain_file(folder: Path, path: Path) -> ClipEntry:
    name = path.relative_to(folder).as_posix()
    kind = "image" if path.suffix.lower() in IMAGE_SUFFIXES else "video"
    return ClipEntry(name, path, "", 0, path.stat().st_size, {"kind": kind, "source": name})


def listed_entry(tar: Path, line: dict[str, Any]) -> ClipEntry:
    """The clip that a line of a shard's listing tells of."""
    place = {name: line.pop(name) for name in ("key", "member", "offset", "size")}
    return ClipEntry(tar=tar, record=line, **place)


def _scan_tar(tar: Path) -> list[ClipEntry]:
    """The entries of a foreign tar; members of one sample share their name up to the first dot of its last part."""
    entries: list[ClipEntry] = []
    media: tarfile.TarInfo | None = None
    record: dict[str, Any] = {}
    current: str | None = None

    def finish() -> None:
        if current is not None and media is not None:
            suffix = Path(media.name).suffix.lower()
            kind = "image" if suffix in IMAGE_SUFFIXES else "video"
            entries.append(ClipEntry(current, tar, media.name, media.offset_data, media.size, {"kind": kind} | record))

    try:
        with tarfile.open(tar, "r:") as archive:
            for member, key, suffix in _members(archive):
                if key != current:
                    finish()
                    current, media, record = key, None, {}
                if suffix in VIDEO_SUFFIXES or suffix in IMAGE_SUFFIXES:
                    # A video wins over a thumbnail that travels with it.
                    if media is None or suffix in VIDEO_SUFFIXES:
                        media = member
                elif suffix in (".json", ".txt"):
                    text = _text(archive, member)
                    record = record | _known(text) if suffix == ".json" else {"caption": text.strip()} | record
    except (tarfile.TarError, OSError) as error:
        log.warning("%s: damaged, only its first %d clips are used (%s)", tar, len(entries), error)
        return entries
    finish()
    return entries


def _members(archive: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, str, str]]:
    """Each file with its WebDataset key and the last suffix of its name, lower case."""
    for member in archive:
        folder, _, name = member.name.rpartition("/")
        stem, dot, _ = name.partition(".")
        if member.isfile() and dot and stem:
            yield member, f"{folder}/{stem}" if folder else stem, Path(name).suffix.lower()


def _text(archive: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = archive.extractfile(member)
    return file.read().decode("utf-8", errors="replace") if file is not None else ""


def _known(text: str) -> dict[str, Any]:
    """The record keys of a foreign JSON member that have the type they have in ours; the others are left out."""
    try:
        values = json.loads(text)
    except ValueError:
        return {}
    if not isinstance(values, dict):
        return {}
    return {key: values[key] for key, kind in _RECORD_TYPES.items() if isinstance(values.get(key), kind)}
