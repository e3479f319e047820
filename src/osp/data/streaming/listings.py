"""The clips of shards that lie elsewhere, without the shards: from their index, or counted once and kept."""

import hashlib
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

from osp.data.features.format import FEATURES_FORMAT, load_feature_index, read_feature_shard, shard_path
from osp.data.media.limits import Limits
from osp.data.shards.entry import ClipEntry, listed_entry
from osp.data.shards.foreign import scan_file
from osp.data.shards.index import INDEX_NAME, ListingLines, indexed_clips, load_index
from osp.data.shards.tar import to_json
from osp.data.streaming.cache import ShardCache
from osp.data.streaming.fetching import Patience, Remote, ShardFetchError, fetch
from osp.data.streaming.urls import beside, shown
from osp.data.summary import Tally
from osp.documents import COUNT, MIB, DocumentError, check_form, parse_json
from osp.errors import DataError
from osp.files import folder_lock, write_whole

log = logging.getLogger(__name__)

_MOST_INDEX = 64 * MIB
_MOST_LISTING = 1024 * MIB
_MOST_SHARDS = 1_000_000
_AT_ONCE = 8  # files that are fetched at the same time
_COUNTED_FORM: Mapping[Any, Any] = {"bytes": COUNT, "sha256": str, "clips": COUNT}

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class ShardList:
    """Shards and their clips; `tar` of a clip has the name of its shard's local copy, which need not be there."""

    shards: list[Remote]
    entries: list[ClipEntry]
    number_of: Mapping[Path, int]  # the shard that a `tar` stands for


def fetch_bytes(url: str, patience: Patience, most: int = _MOST_INDEX, sha256: str | None = None) -> bytes:
    """The content of a small file. Raises ShardFetchError."""
    file = BytesIO()
    fetch(Remote(url, sha256=sha256), file, patience, most)
    return file.getvalue()


def _at_once(call: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            return list(pool.map(call, items))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# --- folders with our index -------------------------------------------------------------------------------------------


class IndexedFolder:
    """A folder from elsewhere with our `index.json`; a local one holds copies of the index and the listings.

    Raises ShardFetchError if there is no index to read, DataError if it is none of ours or names anything but tars
    beside it.
    """

    def __init__(self, url: str, copies: Path, patience: Patience) -> None:
        self.url, self.patience = url, patience
        content = fetch_bytes(beside(url, INDEX_NAME), patience)
        name = re.sub(r"[^\w.-]+", "_", shown(url), flags=re.ASCII)[-60:]
        # By its content: the listings of another index never stand beside this one.
        digest = hashlib.sha256(f"{url}\n".encode() + content).hexdigest()[:16]
        self.folder = copies / f"{name}-{digest}"
        with folder_lock(self.folder):
            write_whole(self.folder / INDEX_NAME, content)
            self.index = self._read(content)
            names = self._names()
            if len(names) > _MOST_SHARDS:
                raise DataError(f"{shown(url)}: its index lists {len(names)} shards, at most {_MOST_SHARDS} are read")
            _at_once(self._copy_listing, list(names.items()))

    @property
    def holds_features(self) -> bool:
        """Whether its clips are encoded."""
        return "identity" in self.index

    def videos(self, limits: Limits, tally: Tally) -> ShardList:
        """The clips of shards of videos."""
        if self.holds_features:
            raise DataError(f"{shown(self.url)}: holds features, not videos; read them with data=stream_features")
        shards = [
            Remote(self._tar(shard["file"]), shard["bytes"], shard.get("sha256")) for shard in self.index["shards"]
        ]
        number_of = {self.folder / shard["file"]: number for number, shard in enumerate(self.index["shards"])}
        return ShardList(shards, indexed_clips(self.folder, self.index, limits, tally), number_of)

    def features(self) -> ShardList:
        """The clips of shards of features."""
        tars = [shard_path(self.folder, number) for number in range(self.index["shards"])]
        read = [read_feature_shard(tar, there=False) for tar in tars]
        shards = [
            Remote(self._tar(tar.name), head["bytes"], head["sha256"])
            for tar, (head, _) in zip(tars, read, strict=True)
        ]
        entries = [entry for _, listed in read for entry in listed]
        return ShardList(shards, entries, {tar: number for number, tar in enumerate(tars)})

    def _read(self, content: bytes) -> dict[str, Any]:
        try:
            value = parse_json(content, INDEX_NAME, {...: Any})
            read = load_feature_index if value.get("format") == FEATURES_FORMAT else load_index
            index = read(self.folder)
        except DataError as error:
            raise DataError(f"{shown(self.url)}: {error}") from error
        assert index is not None
        return index

    def _names(self) -> dict[str, str | None]:
        """The names of the files that are needed beside the index, with their checksums where these are known."""
        if not self.holds_features:
            return {_listing(shard["file"]): shard.get("listing_sha256") for shard in self.index["shards"]}
        if self.index["shards"] > _MOST_SHARDS:
            raise DataError(f"{shown(self.url)}: its index claims {self.index['shards']} shards")
        names = {_listing(shard_path(self.folder, number).name): None for number in range(self.index["shards"])}
        return {**names, **({self.index["empty"]: self.index.get("empty_sha256")} if self.index["empty"] else {})}

    def _copy_listing(self, named: tuple[str, str | None]) -> None:
        name, sha256 = named
        url, path = beside(self.url, name), self.folder / name
        if path.exists():
            return
        for attempt in range(self.patience.attempts):
            write_whole(path, fetch_bytes(url, self.patience, _MOST_LISTING, sha256))
            try:
                if self.holds_features and path.suffix == ".jsonl":
                    read_feature_shard(path.with_suffix(".tar"), there=False)
                return
            except DataError as error:
                path.unlink()
                if attempt + 1 == self.patience.attempts:
                    raise ShardFetchError(f"{shown(url)}: {error}") from error

    def _tar(self, name: str) -> str:
        return beside(self.url, name)


def _listing(tar: str) -> str:
    return f"{tar.removesuffix('.tar')}.jsonl"


# --- tars without an index --------------------------------------------------------------------------------------------


def count_tars(urls: Sequence[str], copies: Path, cache: ShardCache, limits: Limits, tally: Tally) -> ShardList:
    """The clips of tars, each read through once by any process of this machine; what was found is kept in `copies`.

    Raises ShardFetchError for a tar that cannot be had.
    """
    with folder_lock(copies):
        places = [_counted_place(url, copies, limits) for url in urls]
        new = [(url, place) for url, place in zip(urls, places, strict=True) if not place.exists()]
        if new:
            log.info("%d of %d shards are read through once, to count their clips", len(new), len(urls))
        _at_once(lambda item: _count(*item, cache, limits, tally), new)
        shards, entries = [], []
        for url, place in zip(urls, places, strict=True):
            head, listed = _read_counted(place, limits)
            shards.append(Remote(url, head["bytes"], head["sha256"], tar=True))
            entries += listed
    return ShardList(shards, entries, {place.with_suffix(".tar"): number for number, place in enumerate(places)})


def _counted_place(url: str, copies: Path, limits: Limits) -> Path:
    digest = hashlib.sha256(f"{url}\n{limits}".encode()).hexdigest()[:24]
    return copies / f"{digest}.jsonl"


def _count(url: str, place: Path, cache: ShardCache, limits: Limits, tally: Tally) -> None:
    remote = Remote(url, tar=True)
    with cache.open(remote) as file:
        found = scan_file(file, place.with_suffix(".tar"), limits, tally)
        file.seek(0)
        digest = hashlib.sha256()
        while data := file.read(MIB):
            digest.update(data)
        sha256, size = digest.hexdigest(), file.tell()
    cache.rename(remote, Remote(url, size, sha256, tar=True))
    lines = [{**e.record, "key": e.key, "member": e.member, "offset": e.offset, "size": e.size} for e in found]
    head = {"bytes": size, "sha256": sha256, "clips": len(found)}
    write_whole(place, b"".join(to_json(line) + b"\n" for line in [head, *lines]))


def _read_counted(place: Path, limits: Limits) -> tuple[dict[str, Any], list[ClipEntry]]:
    try:
        (where, head), *lines = ListingLines(place)
        check_form(head, _COUNTED_FORM, where)
        entries = [listed_entry(place.with_suffix(".tar"), line, at, limits) for at, line in lines]
        if len(entries) != head["clips"]:
            raise DocumentError(f"{place}: lists {len(entries)} of {head['clips']} clips")
    except (DocumentError, ValueError) as error:
        raise DataError(f"{error}; delete {place}, and its shard is counted again") from error
    return head, entries
