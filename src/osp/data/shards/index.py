"""The clips of a folder: `read_listing` lists them, and each entry reads its own bytes.

The format is described in data/README.md. Folders that `osp shards` wrote have an `index.json`; any other folder of
WebDataset tars (video2dataset's, for one) is listed by walking the tar headers, and a folder of plain videos by name.
"""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from osp.data.media.folder import kind_of, media_files
from osp.data.media.limits import DEFAULT_LIMITS, Limits
from osp.data.shards.captions import SideCars
from osp.data.shards.entry import MEND, ClipEntry, listed_entry
from osp.data.shards.foreign import scan_tar
from osp.data.summary import Tally
from osp.documents import COUNT, DocumentError, check_form, parse_json, printable, read_json, read_text
from osp.errors import DataError
from osp.files import write_whole

__all__ = ["ClipEntry", "Listing", "read_index", "read_listing"]

INDEX_NAME = "index.json"
INDEX_FORMAT = "osp-shards"
INDEX_VERSION = 1

WRITTEN_FORM: Mapping[Any, Any] = {
    "clips": COUNT,
    "images": COUNT,
    "seconds": float,
    "captioned": COUNT,
    "settings": dict,
    "sources": {"file": str, "bytes": COUNT, "sha256?": str},
    "skipped": [{"source": str, "reason": str}],
    "dropped?": [str],
    "expected?": COUNT,
}
"""The keys of `index.json` that writing goes on from."""

_READ_FORM: Mapping[Any, Any] = {
    "shards": [{"file": str, "clips": COUNT, "bytes": COUNT, "sha256?": str, "listing_sha256?": str}],
    **{f"{key.rstrip('?')}?": form for key, form in WRITTEN_FORM.items()},
}

_SHARD_NAME = re.compile(r"[^/\0]{1,200}\.tar")
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4", ".tar.br")


@dataclass(frozen=True)
class Listing:
    """The clips of a folder, and how many files are left out (by a reason that reads on after the number)."""

    entries: list[ClipEntry]
    left_out: Mapping[str, int] = field(default_factory=dict)


def load_index(folder: Path) -> dict[str, Any] | None:
    """The parsed `index.json` of a folder, None if it has none. Raises DataError for one that is not ours."""
    command = "osp shards input=... output=..."
    index = read_index_file(folder, "OSP shards", INDEX_FORMAT, INDEX_VERSION, command, _READ_FORM)
    for shard in [] if index is None else index["shards"]:
        if not _SHARD_NAME.fullmatch(shard["file"]):
            shown = printable(shard["file"][:80])
            raise DataError(f"{folder / INDEX_NAME}: lists {shown}, which is no name of a tar in it; {MEND}")
    return index


def read_index_file(
    folder: Path, what: str, form: str, version: int, command: str, keys: Mapping[Any, Any]
) -> dict[str, Any] | None:
    """The parsed `index.json` of a folder of `what`, None if it has none.

    Raises DataError for a file that is no index of this form and version, for other keys than `keys` declares, and for
    one that is not as it was written; `command` writes one.
    """
    path = folder / INDEX_NAME
    again = f"write the folder anew with `{command}`"
    try:
        index = read_json(path, dict)
    except FileNotFoundError:
        return None
    except DocumentError as error:
        raise DataError(f"{error}; not a readable index: {again}") from error
    if index.get("format") != form:
        raise DataError(f"{path}: not an index of {what} (format {form!r} expected); make one with `{command}`")
    if index.get("version") != version:
        shown = printable(str(index.get("version"))[:40])
        raise DataError(f"{path}: version {shown}, this OSP reads version {version}; {again}")
    if index.pop("sha256", None) not in (None, _digest(index)):
        raise DataError(f"{path}: damaged, it is not as it was written; {again}")
    try:
        check_form(index, keys, str(path))
    except DocumentError as error:
        raise DataError(f"{error}; a damaged index: {again}") from error
    return index


def write_index(folder: Path, index: Mapping[str, Any]) -> None:
    """Replace `index.json` in one step; it ends with a checksum of all that it says."""
    content = json.dumps({**index, "sha256": _digest(index)}, ensure_ascii=False, indent=1)
    write_whole(folder / INDEX_NAME, content)


def _digest(index: Mapping[str, Any]) -> str:
    # The digest is that of the index as it is read back: JSON has no tuples, and lone surrogates in names are escaped.
    return hashlib.sha256(json.dumps(index, sort_keys=True).encode()).hexdigest()


def read_index(folder: str | Path, limits: Limits = DEFAULT_LIMITS) -> list[ClipEntry]:
    """All clips of a folder, as `read_listing` gives them."""
    return read_listing(folder, limits).entries


def read_listing(folder: str | Path, limits: Limits = DEFAULT_LIMITS) -> Listing:
    """All clips of a folder of shards, of one of plain files, or of a single file of either kind, and what is left out.

    With an `index.json`, the clips are in the order of the shards. Tars without one are read as foreign WebDataset
    shards: listed by their headers, by name, with what their JSON or text members say. Otherwise each video and image
    below the folder is a clip, with the caption that lies beside it. If there are none, the tars in the folders below
    are read, folder by folder in the order of their names. What is passed over is logged, one line a kind.

    Raises:
        DataError: no such folder, no clips in it, or a listed shard is missing, cut short or damaged.
    """
    folder = Path(folder)
    if folder.is_file():
        return _single_file(folder, limits)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder or file; give a folder of videos or of shards, or one of them")
    tally = Tally()
    entries = _shards_of(folder, limits, tally)
    if entries is None:
        entries = _without_tars(folder, limits, tally)
    tally.warn(folder)
    if not entries:
        raise DataError(
            f"{folder}: its shards hold no clips; write them with `osp shards input=VIDEOS output={folder}`"
        )
    return Listing(entries, tally.counts)


def _single_file(path: Path, limits: Limits) -> Listing:
    """The one clip that a file is, or those of a tar."""
    tally = Tally()
    if path.suffix.lower() != ".tar":
        side_cars = SideCars(limits)
        entries = [_plain_file(path.parent, path, side_cars)]
        side_cars.passed_over.warn(path.parent)
    elif not (entries := scan_tar(path, limits, tally)):
        tally.warn(path)
        raise DataError(f"{path}: holds no clips; write shards with `osp shards input=VIDEOS output=FOLDER`")
    tally.warn(path)
    return Listing(entries, tally.counts)


def tars_below(folder: Path) -> tuple[list[Path], list[Path]]:
    """All tars in a folder and below it, and those that are compressed; folder by folder, hidden ones left out."""
    tars: list[Path] = []
    packed: list[Path] = []
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(name for name in files if not name.startswith(".")):
            if name.endswith(".tar") and Path(root, name).is_file():
                tars.append(Path(root, name))
            elif name.lower().endswith(_PACKED):
                packed.append(Path(root, name))
    return tars, packed


def _shards_of(folder: Path, limits: Limits, tally: Tally) -> list[ClipEntry] | None:
    """The clips of the tars that lie in a folder itself; None if there are none."""
    index = load_index(folder)
    if index is not None:
        for shard in index["shards"]:
            _check_size(folder / shard["file"], shard["bytes"])
        return indexed_clips(folder, index, limits, tally)
    tars = sorted(path for path in folder.glob("*.tar") if path.is_file())
    if not tars:
        return None
    for other in sorted({*itertools.chain(*tars_below(folder))} - {*tars}):
        tally.add("further tars, compressed or in a folder below, which are not read", other.relative_to(folder))
    return [entry for tar in tars for entry in scan_tar(tar, limits, tally)]


def indexed_clips(folder: Path, index: Mapping[str, Any], limits: Limits, tally: Tally) -> list[ClipEntry]:
    """The clips of the shards of an index, by their listings in the folder; the tars need not be there."""
    _check_complete(folder, index)
    listed = [entry for shard in index["shards"] for entry in _listed_shard(folder, shard, limits)]
    dropped = {*index.get("dropped", ())}
    for entry in listed if dropped else ():
        if entry.record.get("source") in dropped:
            tally.add("clips of sources that are gone", entry.key)
    return [entry for entry in listed if entry.record.get("source") not in dropped]


def _check_complete(folder: Path, index: Mapping[str, Any]) -> None:
    """Raise DataError for a folder that is to hold more clips than it does so far."""
    if index.get("clips", 0) < (expected := index.get("expected", 0)):
        raise DataError(
            f"{folder}: is not complete, it has {index.get('clips', 0)} of {expected} clips; "
            "run the command that writes it once more, and it goes on"
        )


def _without_tars(folder: Path, limits: Limits, tally: Tally) -> list[ClipEntry]:
    """The clips of a folder that holds no tars itself: plain files, or else the tars in the folders below."""
    tars, packed = tars_below(folder)
    others = Tally()
    try:
        files = media_files(folder, tally=others)
    except DataError as error:
        if packed and not tars:
            raise DataError(
                f"{folder}: no videos, images or tars in it, but {len(packed)} compressed tars "
                f"(first: {printable(packed[0].relative_to(folder))}); decompress them into .tar files with gunzip, "
                "bunzip2, unxz or unzstd, since no single clip can be fetched out of a compressed one"
            ) from error
        if not tars:
            raise
        for tar in packed:
            tally.add("compressed tars, which are not read", tar.relative_to(folder))
        below = [_shards_of(part, limits, tally) for part in dict.fromkeys(tar.parent for tar in tars)]
        return [entry for entries in below for entry in entries or ()]
    tally.take(others)
    for tar in tars + packed:
        tally.add("tars beside videos or images, which alone are read", tar.relative_to(folder))
    side_cars = SideCars(limits)
    entries = [_plain_file(folder, path, side_cars) for path in files]
    side_cars.passed_over.warn(folder)
    return entries


def _plain_file(folder: Path, path: Path, side_cars: SideCars) -> ClipEntry:
    name = path.relative_to(folder).as_posix()
    record: dict[str, Any] = {"kind": kind_of(path), "source": name}
    if (caption := side_cars.find(path)) is not None:
        record |= caption.as_record() | ({"scores": dict(caption.scores)} if caption.scores else {})
    return ClipEntry(name, path, "", 0, path.stat().st_size, record)


def _check_size(tar: Path, size: int) -> None:
    try:
        found = tar.stat().st_size
    except OSError as error:
        raise DataError(f"{tar}: {INDEX_NAME} needs it ({error.strerror}); {MEND}") from error
    if found != size:
        raise DataError(f"{tar}: has {found} bytes, {INDEX_NAME} says {size}; {MEND}")


def _listed_shard(folder: Path, shard: Mapping[str, Any], limits: Limits) -> list[ClipEntry]:
    """The entries of one shard that index.json lists, from the `.jsonl` beside it."""
    tar = folder / shard["file"]
    listing = tar.with_suffix(".jsonl")
    try:
        lines = ListingLines(listing)
    except OSError as error:
        raise DataError(f"{error.filename}: {INDEX_NAME} needs it ({error.strerror}); {MEND}") from error
    if shard.get("listing_sha256", lines.sha256) != lines.sha256:
        raise DataError(f"{listing}: damaged, it is not as it was written; {MEND}")
    entries = [listed_entry(tar, line, place, limits) for place, line in lines]
    if len(entries) != shard["clips"]:
        raise DataError(f"{listing}: lists {len(entries)} clips, {INDEX_NAME} says {shard['clips']}; {MEND}")
    return entries


class ListingLines:
    """The lines of a shard's listing, and their checksum; iterating parses them, ("FILE:LINE", value).

    Raises DocumentError for a file that is no such text, and while iterating for a line that is no JSON.
    """

    def __init__(self, path: Path, most: int = 1 << 32) -> None:
        self.path = path
        self.text = read_text(path, most)
        self.sha256 = hashlib.sha256(self.text.encode()).hexdigest()

    def after_first(self) -> bytes:
        """All lines but the first."""
        return self.text.partition("\n")[2].encode()

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        for number, line in enumerate(self.text.split("\n")[:-1], 1):
            yield f"{self.path}:{number}", parse_json(line, f"{self.path}:{number}")
