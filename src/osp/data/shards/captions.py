"""Captions and scores of source files, from one captions file (JSONL or CSV) or from files beside the sources."""

import csv
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from osp.errors import DataError, UsageError

log = logging.getLogger(__name__)

_FILE_COLUMNS = ("file", "path")


@dataclass(frozen=True)
class Caption:
    """What is said of one source: its text, and the numbers that came with it (aesthetic score, motion, ...)."""

    text: str
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Captions:
    """The captions of a run. A captions file goes before a side-car; `missing` names its files that do not exist."""

    by_file: Mapping[str, Caption] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    def find(self, source: Path) -> Caption | None:
        """The caption of a source file: from the captions file, else from `NAME.json` or `NAME.txt` beside it."""
        return self.by_file.get(os.path.realpath(source)) or _beside(source)


def read_captions(path: Path, folder: Path) -> Captions:
    """Reads a captions file.

    JSONL: `{"file": ..., "caption": ..., ...}` a line; CSV: columns `file` (or `path`) and `caption`. Files are
    relative to the captions file's folder or to `folder`. Every other numeric key or column is a score. The last line
    about a file counts.

    Raises:
        UsageError: no such captions file, or neither JSONL nor CSV.
        DataError: a line of it cannot be understood.
    """
    readers = {".jsonl": _jsonl_rows, ".csv": _csv_rows}
    if path.suffix.lower() not in readers:
        raise UsageError(f"captions={path}: must be a .jsonl or .csv file")
    by_file: dict[str, Caption] = {}
    missing: list[str] = []
    try:
        for place, row in readers[path.suffix.lower()](path):
            name, caption = _entry(place, row)
            found = next((file for file in (path.parent / name, folder / name) if file.exists()), None)
            if found is None:
                missing.append(name)
            else:
                by_file[os.path.realpath(found)] = caption
    except OSError as error:
        raise UsageError(f"captions={path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    if missing:
        total = len(missing) + len(by_file)
        log.warning("%s: %d of the %d files it names do not exist (first: %s)", path, len(missing), total, missing[0])
    return Captions(by_file, tuple(missing))


def _jsonl_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise DataError(f"{path}:{number}: not JSON ({error})") from error
                if not isinstance(row, dict):
                    raise DataError(f'{path}:{number}: not an object like {{"file": ..., "caption": ...}}')
                yield f"{path}:{number}", row


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restkey="")
        columns = reader.fieldnames or []
        if "caption" not in columns or not set(_FILE_COLUMNS) & set(columns):
            raise DataError(f"{path}: needs the columns file (or path) and caption, has {', '.join(columns) or 'none'}")
        try:
            for row in reader:
                yield f"{path}:{reader.line_num}", {key: _as_number(key, value) for key, value in row.items()}
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not CSV ({error})") from error


def _entry(place: str, row: Mapping[str, Any]) -> tuple[str, Caption]:
    name = next((row[column] for column in _FILE_COLUMNS if row.get(column)), None)
    if not isinstance(name, str):
        raise DataError(f"{place}: names no file (key {' or '.join(_FILE_COLUMNS)})")
    return name, _caption(place, row)


def _caption(place: str, row: Mapping[str, Any]) -> Caption:
    text = row.get("caption")
    if not isinstance(text, str | None):
        raise DataError(f"{place}: its caption is not a text but {json.dumps(text)[:40]}")
    return Caption((text or "").strip(), {key: float(value) for key, value in row.items() if _is_number(value)})


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _as_number(column: str, value: str) -> str | float:
    """CSV writes numbers as text; the columns that are text by right stay so."""
    if column in (*_FILE_COLUMNS, "caption"):
        return value
    try:
        return float(value)
    except (TypeError, ValueError):  # not a number; None or a list where the row is shorter or longer than the header
        return value


def _beside(source: Path) -> Caption | None:
    """The side-car's caption; one that cannot be read is told once and passed over."""
    try:
        text, described = _text(source.with_suffix(".txt")), _text(source.with_suffix(".json"))
        if described is not None:
            place = source.with_suffix(".json").name
            row = json.loads(described)
            if not isinstance(row, dict):
                raise DataError(f"{place}: not an object")
            return _caption(place, {"caption": text} | row)
    except (OSError, ValueError, DataError) as error:
        log.warning("%s: its side-car is passed over (%s)", source, error)
        return None
    return None if text is None else Caption(text.strip())


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return None
