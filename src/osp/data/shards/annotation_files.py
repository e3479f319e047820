"""Annotation files of other trainers -> their rows: lists of folders, JSON, JSONL, CSV, and pairs of text files."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osp.documents import MIB, DocumentError, csv_rows, json_lines, printable, read_json, read_text
from osp.errors import DataError, UsageError

_MOST = 4096 * MIB
_METADATA = ("metadata.jsonl", "metadata.csv")
_TEXTS = ("prompts.txt", "prompt.txt", "captions.txt", "caption.txt")
_MEDIA = ("videos.txt", "video.txt", "images.txt", "image.txt")


@dataclass(frozen=True)
class AnnotationFile:
    """One file of annotations, and where what it names lies.

    Args:
        folder: that paths in it are relative to.
        named: the folder as the list of files has it, which the names of sources begin with; empty: they do not.
        media: of a file with a caption in each line the one with the paths.
        published: whether it is one of Open-Sora Plan's, which hold .mp4 and .jpg alone.
    """

    path: Path
    folder: Path
    named: str = ""
    media: Path | None = None
    published: bool = False

    def rows(self) -> Iterator[tuple[str, Any]]:
        """("FILE:LINE" or "FILE: entry N", value) of each row. Raises DocumentError for what is no such file."""
        if self.media is not None:
            yield from self._pairs(self.media)
        elif (suffix := self.path.suffix.lower()) == ".jsonl":
            yield from json_lines(self.path, most=_MOST)
        elif suffix == ".csv":
            yield from csv_rows(self.path, _MOST)
        else:
            rows = read_json(self.path, most=_MOST)
            if not isinstance(rows, list):
                raise DocumentError(f"{self.path}: must be a list of objects with the keys path and cap")
            yield from ((f"{self.path}: entry {number}", row) for number, row in enumerate(rows, 1))

    def _pairs(self, media: Path) -> Iterator[tuple[str, Any]]:
        texts, files = _lines(self.path), _lines(media)
        if len(texts) != len(files):
            raise DocumentError(
                f"{self.path}: has {len(texts)} lines and {media.name} {len(files)}; each file needs one caption"
            )
        for (number, text), (_, file) in zip(texts, files, strict=True):
            yield f"{self.path}:{number}", {"file": file, "caption": text}


def annotation_files(path: Path, folder: Path | None = None) -> list[AnnotationFile]:
    """The files of annotations that a path stands for.

    - A `.txt` has a line `FOLDER,ANNOTATION` for each (`data.txt` of Open-Sora Plan); names are relative to the list's
      own folder, else to the current one. A `.txt` of captions beside one of videos is a pair of such files.
    - `.json`, `.jsonl` and `.csv` are annotations; paths in them are relative to `folder`, else to their own folder.
    - A folder has its `metadata.jsonl` or `metadata.csv`, or such a pair.

    Raises:
        UsageError: no such file, or one of another kind; a pickle, which would run code.
        DataError: a line of a list is none, and the error names it; the list is empty.
    """
    if path.is_dir():
        return [_of_folder(path)]
    if not path.exists():
        raise UsageError(f"annotations={path}: no such file or folder")
    if path.suffix.lower() != ".txt":
        check_kind(path, "annotations=")
        root = path.parent if folder is None else folder
        return [AnnotationFile(path, root, published=_is_published(path))]
    if path.name in _TEXTS and (media := _beside(path.parent, _MEDIA)) is not None:
        return [AnnotationFile(path, path.parent, media=media)]
    if folder is not None:
        raise UsageError(f"input={folder}: a list of folders such as {path} says the folders itself; leave out input")
    return _of_list(path)


def check_kind(path: Path, said: str = "") -> None:
    """Raise UsageError unless a file of annotations is of a kind that is read."""
    suffix = path.suffix.lower()
    if suffix in (".pkl", ".pickle"):
        raise UsageError(
            f"{said}{path}: is a pickle, and reading it would run code of whoever wrote it; have it converted to JSON "
            "(a list of the same objects) by those who trust it"
        )
    if suffix not in (".json", ".jsonl", ".csv"):
        raise UsageError(f"{said}{path}: must be a .json, .jsonl or .csv file, or a .txt with lines FOLDER,ANNOTATION")


def _of_folder(folder: Path) -> AnnotationFile:
    if (metadata := _beside(folder, _METADATA)) is not None:
        return AnnotationFile(metadata, folder)
    texts, media = _beside(folder, _TEXTS), _beside(folder, _MEDIA)
    if texts is None or media is None:
        raise UsageError(
            f"annotations={folder}: the folder has neither {' nor '.join(_METADATA)}, nor prompts.txt with videos.txt; "
            "give a file"
        )
    return AnnotationFile(texts, folder, media=media)


def _of_list(path: Path) -> list[AnnotationFile]:
    files = []
    for number, line in _lines(path):
        fields = [field.strip() for field in line.split(",")]
        if len(fields) != 2 or not all(fields):
            raise DocumentError(
                f"{path}:{number}: must be FOLDER,ANNOTATION, is {printable(line[:80])}; a comma can be in neither"
            )
        folder, annotation = (_found(path, name) for name in fields)
        if not os.path.isfile(annotation):
            raise DataError(f"{path}:{number}: {printable(fields[1])} does not exist")
        if not os.path.isdir(folder):
            raise DataError(f"{path}:{number}: {printable(fields[0])} is no folder")
        check_kind(annotation, f"{path}:{number}: ")
        files.append(AnnotationFile(annotation, folder, fields[0], published=_is_published(annotation)))
    if not files:
        raise DataError(f"{path}: is empty; it must have lines FOLDER,ANNOTATION")
    return files


def _is_published(path: Path) -> bool:
    """Whether a file is of the published form: others' are CSV, or JSONL of this name."""
    return path.suffix.lower() != ".csv" and path.name not in _METADATA


def _found(listed_in: Path, name: str) -> Path:
    beside = listed_in.parent / name
    return beside if os.path.exists(beside) else Path(os.path.abspath(name))


def _lines(path: Path) -> list[tuple[int, str]]:
    """(Number from 1 on, text) of each line that is not blank."""
    lines = read_text(path, _MOST).split("\n")
    return [(number, said) for number, line in enumerate(lines, 1) if (said := line.strip())]


def _beside(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)
