"""Rows of annotation files -> `Annotation`: which frames and pixels of which file are a clip, its captions and scores.

The forms are those of Open-Sora Plan v1.0 to v1.5, of the CSV of the other Open-Sora, and of finetrainers' metadata:
data/README.md. A row that does not fit is counted by its reason, and never ends the reading.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from osp.data.media.errors import ClipError
from osp.data.media.folder import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from osp.data.media.limits import DEFAULT_LIMITS, Limits
from osp.data.media.part import Part
from osp.data.media.video_info import VideoInfo
from osp.data.shards.annotation_files import AnnotationFile
from osp.data.shards.captions import FILE_KEYS, TEXT_KEYS, Caption, NoTextError, TooLongError, caption_of
from osp.data.summary import Tally
from osp.documents import DocumentError, printable
from osp.errors import DataError

_KNOWN = ("num_frames", "fps", "height", "width", "duration", "resolution", "aspect_ratio", "crop", "cut", "frame_idx")
_PUBLISHED = (".mp4", ".jpg")
_LARGE = 1 << 31
_RESIZED = "_resize_1080p.mp4"  # what the files are called that v1.1 prefers, where they lie beside the named one


class UnfitError(DataError):
    """A row, or a file's part, of which no clip can be made; the reason reads on after a number."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Frames(NamedTuple):
    """Which frames of a video a clip has.

    With `exact` there must be so many; else those of them that the file has are taken.
    """

    first: int = 0
    frames: int | None = None  # None: all from the first on
    exact: bool = False


@dataclass(frozen=True)
class Annotation:
    """One clip of a file, as a row describes it.

    Args:
        place: of the row, for messages.
        name: of the file, as shards call their source.
        crop: x0, x1, y0, y1 in pixels.
    """

    place: str
    file: Path
    name: str
    caption: Caption
    frames: Frames
    crop: tuple[int, int, int, int] | None = None

    def part(self, info: VideoInfo) -> Part:
        """The part that it is of its file, which holds `info`; whole where that is the same.

        Raises UnfitError where the file has no such part.
        """
        crop = self.crop if self.crop != (0, info.width, 0, info.height) else None
        try:
            Part(crop=crop).size((info.height, info.width), self.name)
        except ClipError:
            raise UnfitError("records whose crop lies outside the frame") from None
        if info.kind == "image":
            return Part(None, crop)
        first, count, exact = self.frames
        end = info.frames if count is None else first + count
        if first >= info.frames or (exact and end > info.frames):
            raise UnfitError("records whose cut or num_frames goes beyond the end of the file")
        end = min(end, info.frames)
        return Part(None if (first, end) == (0, info.frames) else (first, end), crop)


class AnnotationReader:
    """Reads rows; `unfit` counts those that do not fit.

    Args:
        strip: the beginning of absolute paths that is taken away, which leaves them relative to their folder.
    """

    def __init__(self, limits: Limits = DEFAULT_LIMITS, strip: str = "") -> None:
        self.limits, self.strip = limits, strip
        self.unfit = Tally()

    def read(self, file: AnnotationFile) -> list[Annotation]:
        """The clips of one file, in its order. Raises DocumentError where the file itself cannot be read."""
        rows = [*file.rows()]
        sized = any(isinstance(row, dict) and "resolution" in row for _, row in rows)
        read = []
        for where, row in rows:
            place = f"{file.path.name}{where.removeprefix(str(file.path))}"  # shards name no folder of this machine
            try:
                read.append(self._annotation(file, place, row, sized))
            except UnfitError as error:
                self.unfit.add(error.reason, place)
        return read

    def _annotation(self, file: AnnotationFile, place: str, row: Any, sized: bool) -> Annotation:
        if not isinstance(row, dict):
            raise UnfitError("records that are no objects")
        path, name = self._path(file, row)
        is_image = _is_image(path, file.published)
        caption = self._caption(row, place)
        if file.published and sized:
            _check_resolution(row.get("resolution"))
        if not os.path.isfile(path):
            raise UnfitError("records whose file does not exist")
        if "frame_idx" in row and os.path.isfile(resized := f"{os.path.splitext(path)[0]}{_RESIZED}"):
            path, name = Path(resized), f"{os.path.splitext(name)[0]}{_RESIZED}"
        frames = Frames() if is_image else _frames(row, file.published)
        return Annotation(place, path, name, caption, frames, _crop(row.get("crop")))

    def _path(self, file: AnnotationFile, row: Mapping[str, Any]) -> tuple[Path, str]:
        said = next((row[key] for key in FILE_KEYS if row.get(key)), None)
        if not isinstance(said, str) or "\0" in said:
            raise UnfitError("records without a path")
        if self.strip and said.startswith(self.strip):
            said = said[len(self.strip) :].lstrip("/")
        root = os.path.abspath(file.folder)
        path = os.path.normpath(os.path.join(root, said))
        if os.path.commonpath([root, path]) != root or path == root:
            raise UnfitError("records whose path leads out of their folder (strip=PREFIX shortens absolute ones)")
        return Path(path), os.path.join(file.named, os.path.relpath(path, root))

    def _caption(self, row: Mapping[str, Any], place: str) -> Caption:
        try:
            caption = caption_of(row, place, self.limits)
        except NoTextError:
            raise UnfitError("records without a caption") from None
        except TooLongError:
            raise UnfitError(
                f"records whose caption is longer than limits.caption_characters={self.limits.caption_characters}"
            ) from None
        except DocumentError:
            raise UnfitError("records whose caption is no text, nor a list of texts") from None
        if not caption.texts:
            raise UnfitError("records without a caption")
        return replace(caption, scores=_scores(row))


def _is_image(path: Path, published: bool) -> bool:
    suffix = path.suffix.lower()
    if published and suffix not in _PUBLISHED:
        raise UnfitError("records of files that are neither .mp4 nor .jpg")
    if suffix not in VIDEO_SUFFIXES | IMAGE_SUFFIXES:
        raise UnfitError("records of files that are neither videos nor images by their ending")
    return suffix in IMAGE_SUFFIXES


def _check_resolution(said: Any) -> None:
    sides = [said.get(key) for key in ("height", "width")] if isinstance(said, dict) else []
    numbers = [number for side in sides if (number := _as_number(side)) is not None and number > 0]
    if len(numbers) != 2:
        raise UnfitError("records without a resolution above 0")


def _frames(row: Mapping[str, Any], published: bool) -> Frames:
    """The frames of a video's clip. A CSV describes whole files, by numbers that are counted in other ways."""
    fps = _optional(row, "fps")
    if fps is not None and fps <= 0:
        raise UnfitError("records whose fps is no number above 0")
    if not published and row.get("cut") is None:
        return Frames()
    count, exact = _optional(row, "num_frames"), True
    if count is None and fps is not None and (seconds := _optional(row, "duration")) is not None:
        count, exact = min(fps * seconds, _LARGE), False  # as v1.2 counts them, rounded down
    if count is not None and count < 1:
        raise UnfitError("records whose num_frames or duration is no number above 0")
    if row.get("frame_idx") is not None:
        first, end = _frame_idx(row["frame_idx"])
        return Frames(first, int(count or end - first), exact=False)
    first = _first(row.get("cut"))
    return Frames(first, None if count is None else int(count), exact and count is not None)


def _optional(row: Mapping[str, Any], key: str) -> float | None:
    """A number, or None where nothing is said; a CSV has text there. Raises UnfitError for anything else."""
    value = row.get(key)
    if value is None or value == "":
        return None
    number = _as_number(value)
    if number is None or not abs(number) < _LARGE:
        raise UnfitError(f"records whose {'fps' if key == 'fps' else 'num_frames or duration'} is no number above 0")
    return number


def _first(cut: Any) -> int:
    """The clip's first frame in its file: the first entry of `cut`; nothing else of it is read."""
    if cut is None:
        return 0
    first = cut[0] if isinstance(cut, list) and cut else -1
    if not _is_whole(first) or first < 0:
        raise UnfitError("records whose cut is no list that begins with a frame's number")
    return int(first)


def _frame_idx(said: Any) -> tuple[int, int]:
    ends = said.split(":") if isinstance(said, str) else []
    if len(ends) != 2 or not all(end.isascii() and end.isdigit() and len(end) < 10 for end in ends):
        raise UnfitError("records whose frame_idx is no START:END")
    first, end = map(int, ends)
    if first >= end:
        raise UnfitError("records whose frame_idx is no START:END")
    return first, end


def _crop(said: Any) -> tuple[int, int, int, int] | None:
    if said is None:
        return None
    if not isinstance(said, list) or len(said) != 4 or not all(map(_is_whole, said)):
        raise UnfitError("records whose crop is no list x0, x1, y0, y1 of pixels")
    x0, x1, y0, y1 = map(int, said)
    return x0, x1, y0, y1


def _scores(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row that are no facts of the file; `aes` is called `aesthetic`."""
    scores = {}
    for key, value in row.items():
        if key not in (*_KNOWN, *FILE_KEYS, *TEXT_KEYS):
            number = _as_number(value)
            if number is not None:
                scores["aesthetic" if key == "aes" else printable(key)[:60]] = number
    return scores


def _as_number(value: Any) -> float | None:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return float(value) if _is_number(value) and abs(value) < 1e300 else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(min(value, _LARGE))


def _is_whole(value: Any) -> bool:
    """Whether a value is a whole number that may count frames or pixels, or be below 0; JSON may write 3.0."""
    return _is_number(value) and -_LARGE < value < _LARGE and value == int(value)
