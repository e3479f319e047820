"""The requests of a user (prompts with their settings, from a file or a command), and the videos that they become."""

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from osp.checks import check_choice
from osp.documents import parse_json, read_text
from osp.errors import DataError
from osp.sampling.pictures import PictureFiles
from osp.sampling.settings import check_setting

Item = TypeVar("Item")

_NUMBERS = {"seed": "seed", "frames": "clip.frames", "height": "clip.height", "width": "clip.width"}  # in Sampling
_FILES = ("image", "last_image", "video")
_SLUG = 40  # characters of a prompt in a file's name


@dataclass(frozen=True)
class Request:
    """A prompt, and what a line of a file says for it alone; None: as for all others.

    `image`, `last_image` and `video` are files of given frames; `name` stands in the file's name instead of the prompt.
    """

    prompt: str
    seed: int | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    negative_prompt: str | None = None
    image: Path | None = None
    last_image: Path | None = None
    video: Path | None = None
    name: str | None = None

    @property
    def size(self) -> dict[str, int]:
        """The request's own frames, height and width, as far as it gives them."""
        sizes = {"frames": self.frames, "height": self.height, "width": self.width}
        return {key: size for key, size in sizes.items() if size is not None}

    def pictures(self, keep_frames: int) -> PictureFiles:
        """Its own files of given frames; of a video so many are gone on with."""
        return PictureFiles(self.image, self.last_image, self.video, keep_frames)


def read_requests(path: Path) -> list[Request]:
    """The requests in a file: `.jsonl` has an object a line, with the keys of `Request`; any other a prompt a line.

    Empty lines are passed over. Files of pictures are named from the folder of this one. Raises DataError naming the
    first line that is broken, and for a file that cannot be read or has no prompt.
    """
    try:
        lines = read_text(path).split("\n")  # other separators may stand inside a string
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    requests = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            text = line.strip()
            where = f"{path}, line {number}"
            is_object = path.suffix.lower() == ".jsonl"
            requests.append(_parsed(text, path.parent, where) if is_object else Request(text))
    if not requests:
        raise DataError(f"{path}: has no prompt in it; write one a line")
    return requests


def _parsed(line: str, folder: Path, where: str) -> Request:
    given = parse_json(line, where)
    if not isinstance(given, dict):
        raise DataError(f'{where}: must be an object, like {{"prompt": "a red circle"}}')
    known = [field.name for field in fields(Request)]
    for key, value in given.items():
        check_choice(f"{where}: key", key, known, DataError)
        if value is None and key != "prompt":
            continue
        if key in _NUMBERS:
            check_setting(_NUMBERS[key], value, f"{where}: {key}", DataError)
        elif not isinstance(value, str):
            raise DataError(f"{where}: {key}={'null' if value is None else value}: must be text")
    if not given.get("prompt", "").strip():
        raise DataError(f"{where}: has no prompt")
    files: dict[str, Any] = {key: folder / given[key] for key in _FILES if given.get(key) is not None}
    return Request(**given | files)


@dataclass(frozen=True)
class Video:
    """One video to make: what is asked for, with which seed, and the name of its file without a suffix."""

    request: Request
    seed: int
    stem: str


def list_videos(requests: Sequence[Request], seed: int, per_prompt: int) -> list[Video]:
    """The videos of the requests in their order, `per_prompt` of each.

    A request's own seed is that of its first video, else the first of all gets `seed`; the following ones count on.
    """
    videos: list[Video] = []
    for request in requests:
        first = seed + len(videos) if request.seed is None else request.seed
        for own_seed in range(first, first + per_prompt):
            stem = f"{len(videos):03d}_{slug(request.name or request.prompt)}_seed{own_seed}"
            videos.append(Video(request, own_seed, stem))
    return videos


def slug(text: str) -> str:
    """Text as part of a file's name: its words in any script, in lower case, as many as fit."""
    plain = unicodedata.normalize("NFKC", text).lower()
    # Marks too, which are the vowels of some scripts.
    words = "".join(one if unicodedata.category(one)[0] in "LMN" else " " for one in plain).split()
    kept = "-".join(words)[: _SLUG + 1]
    return (kept if len(kept) <= _SLUG else kept.rpartition("-")[0] or kept[:_SLUG]) or "video"


def batches(items: Sequence[Item], key: Callable[[Item], Any], size: int) -> list[list[Item]]:
    """Items in batches of at most `size` that follow each other and have the same key, such as a shape."""
    made: list[list[Item]] = []
    for item in items:
        if made and len(made[-1]) < size and key(made[-1][0]) == key(item):
            made[-1].append(item)
        else:
            made.append([item])
    return made
