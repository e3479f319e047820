"""The videos and images below a folder."""

import logging
import os
from pathlib import Path

from osp.errors import DataError

log = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mkv", ".mov", ".webm", ".avi", ".gif"})
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})


def media_files(folder: Path, exclude: Path | None = None) -> list[Path]:
    """All videos and images below `folder`, by name; hidden ones and those below `exclude` are passed over.

    Raises DataError if there are none.
    """
    found: list[Path] = []
    seen = set() if exclude is None else {os.path.realpath(exclude)}
    for root, folders, files in os.walk(folder, followlinks=True):
        # A link to a folder above would never end.
        folders[:] = [name for name in folders if not name.startswith(".")]
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(root, name)) not in seen]
        seen.update(os.path.realpath(os.path.join(root, name)) for name in folders)
        for file in files:
            path = Path(root, file)
            if file.startswith(".") or path.suffix.lower() not in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
                continue
            if path.is_file():
                found.append(path)
            else:
                log.warning("%s: passed over (a broken link or no file)", path)
    if not found:
        kinds = " ".join(sorted(suffix[1:] for suffix in VIDEO_SUFFIXES | IMAGE_SUFFIXES))
        raise DataError(f"{folder}: no videos or images in it ({kinds})")
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())
