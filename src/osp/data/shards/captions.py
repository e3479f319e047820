"""Captions and scores of source files, from one captions file (JSONL, JSON or CSV) or from files beside the sources.

Other trainers call things by other names, and all of these are read: a row names its file under one of `FILE_KEYS` and
has its text, or a list of texts, under one of `TEXT_KEYS`. Formats: data/README.md.
"""

import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from osp.data.media.limits import DEFAULT_LIMITS, Limits
from osp.data.summary import Tally
from osp.documents import MIB, DocumentError, csv_rows, json_lines, parse_json, printable, read_json, read_text
from osp.errors import DataError, UsageError

log = logging.getLogger(__name__)

FILE_KEYS = ("file", "path", "file_name", "filename", "video", "video_path", "image", "image_path", "media_path")
"""Keys and columns that name the file of a row; the first that a row has counts."""

TEXT_KEYS = ("caption", "captions", "text", "cap", "prompt")
"""Keys and columns that hold the text of a row, or a list of texts; the first that is not empty counts."""

SIDE_CAR_BYTES = 4 * MIB
"""A larger side-car, or JSON or text member of a tar, is passed over."""

_CAPTIONS_BYTES = 4096 * MIB


class TooLongError(DocumentError):
    """A caption of more characters than the limits allow; it is passed over wherever it stands."""


class NoTextError(DocumentError):
    """A row that has none of the keys that a text may have; a captions file with one is refused."""


@dataclass(frozen=True)
class Caption:
    """The captions of one source, and the numbers that came with them (aesthetic score, motion, ...).

    Args:
        texts: all texts, none of them empty.
    """

    texts: tuple[str, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The first text; empty if there is none."""
        return self.texts[0] if self.texts else ""

    def as_record(self) -> dict[str, Any]:
        """`caption`, and `captions` where there are several."""
        return {"caption": self.text} | ({"captions": list(self.texts)} if len(self.texts) > 1 else {})


def caption_of(row: Mapping[str, Any], place: str, limits: Limits = DEFAULT_LIMITS) -> Caption:
    """The caption of a row: its texts, and every other key with a number as a score.

    Raises NoTextError for a row without any of `TEXT_KEYS`, naming the keys that it has, TooLongError for a text of too
    many characters, and DocumentError for one that is no text.
    """
    found = [key for key in TEXT_KEYS if key in row]
    scores = scores_of(row)
    if not found:
        keys = printable(", ".join(row))[:200] or "none"
        raise NoTextError(f"{place}: has no text under {_either(TEXT_KEYS)}; its keys are {keys}")
    texts = next((texts for key in found if (texts := _texts(row[key], key, place))), ())
    longest = max(map(len, texts), default=0)
    if longest > limits.caption_characters:
        raise TooLongError(
            f"{place}: has a caption of {longest} characters, more than limits.caption_characters="
            f"{limits.caption_characters}"
        )
    return Caption(texts, scores)


def scores_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The keys of a row that have a number, but not those of its file and text."""
    named = (*FILE_KEYS, *TEXT_KEYS)
    return {key: float(value) for key, value in row.items() if key not in named and _is_number(value)}


class SideCars:
    """The captions that lie beside files: `NAME.json` or `NAME.txt`, in capitals or not.

    A text in the JSON counts before one in the TXT. What cannot be used is passed over and counted in `passed_over`.
    """

    def __init__(self, limits: Limits = DEFAULT_LIMITS) -> None:
        self.limits = limits
        self.passed_over = Tally()
        self._folders: dict[Path, dict[tuple[str, str], str]] = {}

    def find(self, source: Path) -> Caption | None:
        """The caption beside a source; None if there is no side-car that can be used."""
        text = self._read(source, ".txt")
        described = self._read(source, ".json")
        if described is None:
            return text
        if text is None or described.texts:
            return described
        return Caption(text.texts, described.scores)

    def _read(self, source: Path, suffix: str) -> Caption | None:
        path = self._path(source, suffix)
        if path is None:
            return None
        try:
            content = read_text(path, SIDE_CAR_BYTES)
            if suffix == ".txt":
                return caption_of({"text": content}, str(path), self.limits)
            row: dict[str, Any] = parse_json(content, str(path), {...: Any})
        except (DataError, OSError) as error:
            self.passed_over.add("side-cars that are passed over", error)
            return None
        return self._described(source, row, path)

    def _described(self, source: Path, row: dict[str, Any], path: Path) -> Caption | None:
        try:
            return caption_of(row, str(path), self.limits)
        except NoTextError as error:
            if self._path(source, ".txt") is None:
                self.passed_over.add("side-cars without a text", error)
            return Caption((), scores_of(row))
        except DocumentError as error:
            self.passed_over.add("side-cars that are passed over", error)
            return None

    def _path(self, source: Path, suffix: str) -> Path | None:
        """The side-car of a source with this suffix, in capitals or not; small letters come first."""
        if source.parent not in self._folders:
            self._folders[source.parent] = self._list(source.parent)
        name = self._folders[source.parent].get((source.stem, suffix))
        return None if name is None else source.parent / name

    def _list(self, folder: Path) -> dict[tuple[str, str], str]:
        """The names of all side-cars that may be in a folder, by stem and suffix in small letters."""
        found: dict[tuple[str, str], str] = {}
        for name in sorted(os.listdir(folder), reverse=True):  # small letters sort behind capitals
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in (".txt", ".json"):
                read = found.setdefault((stem, suffix.lower()), name)
                if read != name:
                    self.passed_over.add("side-cars in a second spelling", f"{name} beside {read}, which is read")
        return found


@dataclass(frozen=True)
class Captions:
    """The captions of a run. A captions file counts before a side-car; `missing` names its files that do not exist."""

    by_file: Mapping[str, Caption] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    side_cars: SideCars = field(default_factory=SideCars)

    def find(self, source: Path) -> Caption | None:
        """The caption of a source file: from the captions file, else from `NAME.json` or `NAME.txt` beside it."""
        return self.by_file.get(os.path.realpath(source)) or self.side_cars.find(source)


def read_captions(path: Path, folder: Path, limits: Limits = DEFAULT_LIMITS) -> Captions:
    """The captions of a file whose names are relative to its own folder or to `folder`; the last row about one counts.

    JSONL has an object a line; JSON has a list of objects, or an object of file names; CSV has columns. Every other key
    or column with a number is a score. A caption of too many characters is passed over with one line.

    Raises:
        UsageError: no such captions file, or another kind of file.
        DataError: a row of it cannot be understood; the error names the line.
    """
    by_file: dict[str, Caption] = {}
    missing: list[str] = []
    side_cars = SideCars(limits)
    for name, caption in caption_rows(path, limits, side_cars.passed_over):
        found = next((file for file in (path.parent / name, folder / name) if os.path.exists(file)), None)
        if found is None:
            missing.append(name)
        else:
            by_file[os.path.realpath(found)] = caption
    if missing:
        total, first = len(missing) + len(by_file), printable(missing[0])
        log.warning("%s: %d of the %d files it names do not exist (first: %s)", path, len(missing), total, first)
    return Captions(by_file, tuple(missing), side_cars)


def caption_rows(path: Path, limits: Limits, passed_over: Tally) -> Iterator[tuple[str, Caption]]:
    """(Name, caption) of each row of a captions file; a caption of too many characters is counted in `passed_over`.

    Raises UsageError and DataError as `read_captions`.
    """
    readers = {".jsonl": json_lines, ".json": _json_rows, ".csv": _csv_rows}
    if path.suffix.lower() not in readers:
        raise UsageError(f"captions={path}: must be a .jsonl, .json or .csv file")
    rows = 0
    try:
        for rows, (place, row) in enumerate(readers[path.suffix.lower()](path), 1):  # noqa: B007
            name = _file_of(row, place)
            try:
                caption = caption_of(row, place, limits)
            except TooLongError as error:
                passed_over.add("captions that are passed over", error)
                caption = Caption((), scores_of(row))
            yield name, caption
    except OSError as error:
        raise UsageError(f"captions={path}: cannot be read ({error.strerror})") from error
    if not rows:
        raise DataError(f"{path}: holds no captions")


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a list, or of an object from file names to texts or rows."""
    value = read_json(path, most=_CAPTIONS_BYTES)
    if isinstance(value, dict):
        for name, said in value.items():
            row = said if isinstance(said, dict) else {"caption": said}
            yield f"{path}: {printable(name)[:80]}", {"file": name} | row
        return
    if not isinstance(value, list):
        raise DocumentError(f"{path}: must be a list of objects with the keys file and caption")
    for number, row in enumerate(value, 1):
        yield f"{path}: entry {number}", row


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for place, row in csv_rows(path, _CAPTIONS_BYTES):
        yield place, {key: _as_number(key, value) for key, value in row.items()}


def _file_of(row: Any, place: str) -> str:
    if not isinstance(row, dict):
        raise DocumentError(f'{place}: not an object like {{"file": ..., "caption": ...}}')
    name = next((row[key] for key in FILE_KEYS if row.get(key)), None)
    if not isinstance(name, str):
        keys = printable(", ".join(row))[:200] or "none"
        raise DocumentError(f"{place}: names no file under {_either(FILE_KEYS)}; its keys are {keys}")
    return name


def _texts(value: Any, key: str, place: str) -> tuple[str, ...]:
    """The texts of one key, without empty ones; raises DocumentError for anything but a text or a list of texts."""
    texts = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(text, str | None) for text in texts):
        raise DocumentError(f"{place}: its {key} is not a text, nor a list of texts")
    return tuple(said for text in texts if text and (said := _whole_characters(text).strip()))


def _whole_characters(text: str) -> str:
    """The text with halves of characters replaced: JSON can hold them, and no tokenizer takes them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _is_number(value: object) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and (abs(value) < 1e300 if isinstance(value, int) else math.isfinite(value))
    )


def _as_number(column: str, value: str) -> str | float:
    """CSV writes numbers as text; the columns that are text by right stay so."""
    if column in (*FILE_KEYS, *TEXT_KEYS):
        return value
    try:
        return float(value)
    except ValueError:
        return value


def _either(keys: tuple[str, ...]) -> str:
    return f"{', '.join(keys[:-1])} or {keys[-1]}"
