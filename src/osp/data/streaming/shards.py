"""`RemoteShards`: shards that lie elsewhere, as the sources of clips and of features take them."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from osp.checks import check_number
from osp.data.media.limits import Limits
from osp.data.plan import Group
from osp.data.shards.entry import ClipEntry
from osp.data.shards.index import Listing
from osp.data.streaming.ahead import ReadAhead
from osp.data.streaming.cache import ShardCache, check_fits
from osp.data.streaming.fetching import Patience, Remote
from osp.data.streaming.listings import IndexedFolder, ShardList, count_tars, fetch_bytes
from osp.data.streaming.order import LaneOrder, Lanes, Numbers
from osp.data.streaming.urls import Place, expand, is_remote, listed, shown
from osp.data.summary import Tally
from osp.documents import decode_text, read_text
from osp.errors import DataError, UsageError


@dataclass(frozen=True)
class RemoteEntry(ClipEntry):
    """A clip of a shard that lies elsewhere; `tar` has the name that its local copy would have in the listing."""

    cache: ShardCache = field(kw_only=True)
    remote: Remote = field(kw_only=True)
    number: int = field(kw_only=True)  # of the shard

    def read(self) -> bytes:
        """See `ClipEntry.read`; raises ShardFetchError if the shard cannot be fetched."""
        with self.cache.open(self.remote) as file:
            return self.read_from(file)


class RemoteShards:
    """Shards that are fetched whole, one after the other, into a local cache, and read there.

    Args:
        urls: the shards, or a list of them. `http(s)://`, what fsspec opens (`s3://`, ...), `pipe:COMMAND` (a shell
            command that writes a tar), or paths. Braces are expanded (`shard-{000..099}.tar`). A name that ends in
            .txt or .list is a file with a tar in each line. Any other is a folder with an `index.json`, as `osp shards`
            and `osp cache` write it; for a command `{name}` stands for the names of its files.
        cache: the folder of the local cache; None: ~/.cache/osp/shards.
        cache_bytes: all shards in the cache have no more bytes together.
        attempts, pause, timeout: see `osp.data.streaming.fetching.Patience`.
        slots, lanes, buffer: see `osp.data.streaming.order.Lanes`.

    Tars without an index are read through once, to count their clips; what is found stays in the cache folder.

    Raises:
        UsageError: a setting makes no sense.
        DataError: an index or list that is none, or that names more than tars beside it; a shard that is too large.
        ShardFetchError: a file cannot be had.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        cache: str | Path | None = None,
        cache_bytes: int = 50_000_000_000,
        attempts: int = 6,
        pause: float = 1.0,
        timeout: float = 60.0,
        slots: int = 8,
        lanes: int = 4,
        buffer: int = 128,
    ) -> None:
        check_number("cache_bytes", cache_bytes, 1, whole=True)
        self.patience, self.lanes = Patience(attempts, pause, timeout), Lanes(slots, lanes, buffer)
        self._named = expand(urls)
        root = _default_cache() if cache is None else Path(cache)
        self.cache = ShardCache(root / "shards", cache_bytes, self.patience)
        self._copies = root / "listings"
        self._indexed = [IndexedFolder(place.url, self._copies, self.patience) for place in self._folders()]
        self._tars = [tar for place in self._named for tar in self._tars_of(place)]
        self.folder = self._indexed[0].folder if len(self._indexed) == 1 else self._copies
        self._ahead = ReadAhead(self.cache, [])

    def __str__(self) -> str:
        first = shown(self._named[0].url)
        return first if len(self._named) == 1 else f"{first} and {len(self._named) - 1} more"

    def listing(self, limits: Limits) -> Listing:
        """See `osp.data.sources.source.Elsewhere`."""
        tally = Tally()
        if self._indexed:
            lists = [folder.videos(limits, tally) for folder in self._indexed]
        else:
            lists = [count_tars(self._tars, self._copies / "counted", self.cache, limits, tally)]
        tally.warn(self)
        return Listing(self._entries(lists), tally.counts)

    def features(self) -> list[ClipEntry]:
        """See `osp.data.sources.source.Elsewhere`."""
        if len(self._indexed) != 1:
            raise DataError(f"{self}: features are read from one folder with the index of `osp cache`")
        return self._entries([self._indexed[0].features()])

    def order(self, entries: Sequence[ClipEntry], group: Group, seed: int, shuffle: bool) -> LaneOrder:
        """See `osp.data.sources.source.Elsewhere`."""
        return LaneOrder(group, _shard_numbers(entries), self.lanes, seed, shuffle, self._ahead.want)

    def fingerprint(self, entries: Sequence[ClipEntry]) -> str:
        """See `osp.data.sources.source.Elsewhere`."""
        numbers = _shard_numbers(entries)
        digest = hashlib.sha256(numbers.tobytes()).hexdigest()[:8]
        return f"in sequence from {len(np.unique(numbers))} shards ({digest}), {self.lanes}"

    def _folders(self) -> list[Place]:
        folders = [place for place in self._named if place.kind == "folder"]
        if folders and len(folders) < len(self._named):
            raise UsageError(f"urls={self}: name either folders with an index, or tars and lists of tars")
        return folders

    def _tars_of(self, place: Place) -> list[str]:
        if place.kind != "list":
            return [place.url] if place.kind == "tar" else []
        if is_remote(place.url):
            text = decode_text(fetch_bytes(place.url, self.patience), shown(place.url))
        else:
            text = read_text(Path(place.url.removeprefix("file://")))
        return listed(place.url, text)

    def _entries(self, lists: Sequence[ShardList]) -> list[ClipEntry]:
        """The clips of several lists of shards, numbered through, each reading through the cache."""
        shards: list[Remote] = []
        entries: list[ClipEntry] = []
        for part in lists:
            for entry in part.entries:
                number = part.number_of[entry.tar]
                entries.append(_through(self.cache, part.shards[number], len(shards) + number, entry))
            shards += part.shards
        if not entries:
            raise DataError(f"{self}: its shards hold no clips; write them with `osp shards` or `osp cache`")
        check_fits(max(shards, key=lambda shard: shard.size or 0), self.cache.limit)
        self._ahead = ReadAhead(self.cache, shards)
        return entries


def _through(cache: ShardCache, remote: Remote, number: int, entry: ClipEntry) -> RemoteEntry:
    return RemoteEntry(**vars(entry), cache=cache, remote=remote, number=number)


def _shard_numbers(entries: Sequence[ClipEntry]) -> Numbers:
    return np.array([entry.number for entry in entries if isinstance(entry, RemoteEntry)], dtype=np.int64)


def _default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "osp" / "shards"
