"""The videos and images below a folder, and how many other files there are."""

import os
from collections.abc import Iterator
from pathlib import Path

from osp.data.media.errors import ClipError
from osp.data.media.stills import is_animation, is_picture
from osp.data.summary import Tally
from osp.errors import DataError

VIDEO_SUFFIXES = frozenset(
    (
        ".mp4", ".m4v", ".mkv", ".mov", ".qt", ".webm", ".avi", ".divx", ".gif", ".ts", ".m2ts", ".mts",
        ".flv", ".f4v", ".3gp", ".3g2", ".mpg", ".mpeg", ".m2v", ".vob", ".wmv", ".asf", ".ogv", ".ogm",
        ".mxf", ".dv", ".apng",
    )
)  # fmt: skip
IMAGE_SUFFIXES = frozenset(
    (
        ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".j2k",
    )
)  # fmt: skip
_MAY_MOVE = frozenset({".webp", ".png", ".apng", ".avif"})  # stills or animations, which only the file tells
# Suffixes of files that may lie beside videos.
_DESCRIBE = frozenset((".txt", ".json", ".jsonl", ".csv", ".md", ".log", ".lock"))


def media_files(folder: Path, exclude: Path | None = None, tally: Tally | None = None) -> list[Path]:
    """All videos and images below `folder`, by name, except hidden ones and those below `exclude`.

    Other files are counted in `tally` by their suffix (".heic files"), hidden videos and images as such. Suffixes in
    capitals are the same. Raises DataError if there are no videos or images.
    """
    found: list[Path] = []
    tally = tally or Tally()
    for path in _files(folder, exclude):
        suffix = path.suffix.lower()
        if path.name.startswith("."):
            if suffix in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
                tally.count("hidden videos and images")
        elif suffix in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
            if path.is_file():
                found.append(path)
            else:
                tally.add("videos and images that are broken links or no files", path.relative_to(folder))
        elif suffix not in _DESCRIBE and path.is_file():
            tally.add(f"{suffix} files" if suffix else "files without a suffix", path.relative_to(folder))
    if not found:
        kinds = " ".join(sorted(suffix[1:] for suffix in VIDEO_SUFFIXES | IMAGE_SUFFIXES))
        others = ", ".join(f"{count} {reason}" for reason, count in tally.counts.items())
        raise DataError(f"{folder}: no videos or images in it ({kinds}){f'; there are {others}' if others else ''}")
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())


def _files(folder: Path, exclude: Path | None) -> Iterator[Path]:
    """Every file below a folder, except in hidden folders."""
    seen = set() if exclude is None else {os.path.realpath(exclude)}
    for root, folders, files in os.walk(folder, followlinks=True):
        # A link to a folder above would never end.
        folders[:] = [name for name in folders if not name.startswith(".")]
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(root, name)) not in seen]
        seen.update(os.path.realpath(os.path.join(root, name)) for name in folders)
        yield from (Path(root, file) for file in files)


def kind_of(path: Path) -> str:
    """Video or image, by a file's suffix, and by its header where it may hold a still or an animation."""
    suffix = path.suffix.lower()
    if suffix in _MAY_MOVE:
        try:
            if is_picture(path, path.name):
                return "video" if is_animation(path, path.name) else "image"
        except ClipError:
            pass
    return "image" if suffix in IMAGE_SUFFIXES else "video"
