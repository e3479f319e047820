"""The clips of a data set of Hugging Face's `datasets`, which is installed by `pip install datasets`."""

import hashlib
import importlib
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from osp.checks import check_number
from osp.data.media.limits import DEFAULT_LIMITS, Limits
from osp.data.media.shape import Shape
from osp.data.media.video import ClipError
from osp.data.shards.captions import TEXT_KEYS, Caption, caption_of
from osp.data.sources.decoding import Decoding
from osp.data.sources.source import ClipSource
from osp.data.summary import Summary
from osp.documents import printable
from osp.errors import DataError, UsageError

_SAVED = ("dataset_dict.json", "state.json")  # left by `save_to_disk`
_MEDIA_COLUMNS = ("video", "mp4", "image", "png", "jpg", "path", "file", "file_name")


class DatasetClips(ClipSource):
    """The clips of a data set whose rows hold videos or images, decoded to one size and length.

    Args:
        dataset: a folder that `save_to_disk` wrote, or one of Parquet files, or of videos with `metadata.csv`; else a
            name on the Hub.
        split: which part of it.
        streaming: rows are fetched without downloading the whole set. The first `clips` are fetched when the source is
            made, and kept in memory as encoded files, since training reads in any order.
        clips: the first so many rows; None: all, which streaming does not know.
        media: the column of the videos or images; None: the first of video, mp4, image, png, jpg, path, file and
            file_name that there is. A row holds the bytes of a file or its path.
        frames, height, width, stride, fps, random_start, flip, limits: as for `ShardClips`.

    The caption is in a column of `TEXT_KEYS` (`caption`, `text`, ...), a text or a list of texts.

    Raises:
        UsageError: `datasets` is not installed, or a setting makes no sense.
        DataError: the data set cannot be read, or has no such column.
    """

    def __init__(
        self,
        dataset: str,
        frames: int,
        height: int,
        width: int,
        split: str = "train",
        streaming: bool = False,
        clips: int | None = None,
        media: str | None = None,
        stride: int = 1,
        fps: float | None = None,
        random_start: bool = True,
        flip: bool = False,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        for name, value in (("frames", frames), ("height", height), ("width", width)):
            check_number(name, value, 1, whole=True)
        check_number("clips", clips, 1, whole=True, null="all rows")
        if streaming and clips is None:
            raise UsageError("streaming=true: give clips=N too, the number of rows to fetch")
        self.dataset, self.split, self.shape, self.limits = str(dataset), split, Shape(frames, height, width), limits
        self.path = Path(dataset) if Path(dataset).is_dir() else None
        self.decoding, self.mirrors = Decoding(stride, fps, random_start, flip, limits), flip
        rows = _load(self.dataset, split, streaming)
        columns = [*(rows.features or {})]
        self.media = _media_column(self.dataset, columns, media)
        rows = _undecoded(rows, self.media)
        if streaming:
            rows = [*itertools.islice(rows, clips)]
        elif clips is not None:
            rows = rows.select(range(min(clips, len(rows))))
        self.rows: Any = rows
        self.texts = [name for name in TEXT_KEYS if name in columns]
        self._captioned = self._count_captions()

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str:
        """See `ClipSource.fingerprint`."""
        about = [self.dataset, self.split, len(self), getattr(self.rows, "_fingerprint", "streamed")]
        listing = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
        return f"dataset {self.shape} {self.decoding} media={self.media} clips={len(self)} list={listing}"

    def read(self, index: int, draw: int) -> dict[str, Any]:
        """See `ClipSource.read`."""
        key = f"{self.split}-{index:06d}"
        try:
            row = self.rows[index]
        except (OSError, ValueError, KeyError) as error:
            raise ClipError(key, f"its row cannot be read ({error})") from error
        try:
            said = {name: row.get(name) for name in self.texts}
            caption = caption_of(said, key, self.limits) if said else Caption()
        except DataError as error:
            raise ClipError(key, str(error)) from error
        return self.decoding.decode(_file_of(row[self.media], key), key, caption.as_record(), self.shape, draw)

    def has_captions(self) -> bool:
        """See `ClipSource.has_captions`."""
        return self._captioned > 0

    def summary(self) -> Summary:
        """See `ClipSource.summary`."""
        return Summary(f"{self.dataset} ({self.split})", len(self), {}, self._captioned)

    def _count_captions(self) -> int:
        if not self.texts:
            return 0
        if isinstance(self.rows, list):
            columns = [[row.get(name) for row in self.rows] for name in self.texts]
        else:
            columns = [self.rows[name] for name in self.texts]  # without the videos
        return sum(any(values) for values in zip(*columns, strict=True))


def _load(dataset: str, split: str, streaming: bool) -> Any:
    """The rows of a split, in memory or streamed."""
    try:
        library = importlib.import_module("datasets")
    except ImportError as error:
        raise UsageError("this source needs the package `datasets`: pip install datasets") from error
    try:
        if any((Path(dataset) / name).is_file() for name in _SAVED):
            rows = library.load_from_disk(dataset)
            rows = rows[split] if isinstance(rows, dict) else rows
            return rows.to_iterable_dataset() if streaming else rows
        return library.load_dataset(dataset, split=split, streaming=streaming)
    except Exception as error:  # the library raises of its own, of pyarrow and of the network
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(f"{dataset}: split {split} cannot be read ({reason})") from error


def _undecoded(rows: Any, column: str) -> Any:
    """Rows whose videos are the bytes or the path of a file: this program decodes them itself."""
    library = importlib.import_module("datasets")
    kind = rows.features[column]
    for name in ("Video", "Image"):
        wanted = getattr(library, name, None)
        if wanted is not None and isinstance(kind, wanted):
            return rows.cast_column(column, wanted(decode=False))
    return rows


def _media_column(dataset: str, columns: list[str], wanted: str | None) -> str:
    """The column of the videos or images. Raises DataError if there is none."""
    names = _MEDIA_COLUMNS if wanted is None else (wanted,)
    found = next((name for name in names if name in columns), None)
    if found is None:
        listed = printable(", ".join(columns))[:300] or "unknown"
        raise DataError(f"{dataset}: has no column {' or '.join(names)}; its columns are {listed}: name one by media=")
    return found


def _file_of(value: Any, key: str) -> Path | bytes:
    """The bytes of a file, or its path, in a cell of the data set."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if isinstance(value, str):
        return Path(value)
    raise ClipError(key, "its cell holds neither the bytes nor the path of a file")
