"""Files of pictures -> the frames that are given."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from osp.conditioning import GivenFrames, given_by_mode, given_frames
from osp.data.media.limits import DEFAULT_LIMITS, Limits
from osp.data.media.video import probe, read_clip, to_float
from osp.errors import UsageError
from osp.sampling.settings import FRAMES, check_setting


@dataclass(frozen=True)
class PictureFiles:
    """Where given frames come from.

    `image` and `last_image` are the first and the last frame; of `video` the first `keep_frames` are gone on with;
    `by_number` are any, each with its number. `limits` are what one file may cost.
    """

    image: Path | None = None
    last_image: Path | None = None
    video: Path | None = None
    keep_frames: int = 1
    by_number: tuple[tuple[int, Path], ...] = ()
    limits: Limits = DEFAULT_LIMITS

    @property
    def mode(self) -> str:
        """The one that these files are for. Raises UsageError for files that go together in none."""
        kinds = {"video": self.video, "image": self.image or self.last_image, "given": self.by_number}
        if len(named := [kind for kind, value in kinds.items() if value]) > 1:
            raise UsageError(f"{' and '.join(named)} exclude each other; leave out all but one")
        if self.last_image is not None and self.image is None:
            raise UsageError("last_image needs an image to begin with; give image, or given={-1: FILE}")
        if self.last_image is not None:
            return "transition"
        return "image" if self.image else "continuation" if self.video else FRAMES if self.by_number else "text"

    @property
    def files(self) -> dict[str, Path]:
        """All of them, by what they are."""
        named = {"image": self.image, "last_image": self.last_image, "video": self.video}
        numbered = {str(number): path for number, path in sorted(self.by_number)}
        return {key: path for key, path in named.items() if path is not None} | numbered

    def check(self, mode: str | None) -> None:
        """Raise UsageError unless these are the files of a mode (None: of any), ClipError for one without a picture."""
        check_setting("mode", mode)
        wants = {"image": "image=FILE", "transition": "image=FILE and last_image=FILE", "continuation": "video=FILE"}
        wants |= {"text": "no files of pictures", FRAMES: "given={0: FILE, 8: FILE}"}
        if mode not in (None, self.mode):
            raise UsageError(f"mode={mode} takes {wants[str(mode)]}; given: {', '.join(self.files) or 'none'}")
        for path in self.files.values():
            probe(path, limits=self.limits)

    def read(self, frames: int, height: int, width: int, fps: float) -> GivenFrames:
        """The pictures, scaled to cover the frame and cut to it; a video's are taken at `fps`.

        Raises ClipError for a file that has not as many, UsageError if they leave nothing to generate.
        """

        def picture(path: Path) -> Tensor:
            return to_float(read_clip(path, frames=1, size=(height, width), limits=self.limits))[:, 0]

        if self.by_number:
            pictures = {number: picture(path) for number, path in self.by_number}
            return given_frames(pictures, frames, height, width)
        if self.video is not None:
            rate = None if self.keep_frames == 1 else fps
            kept = read_clip(self.video, frames=self.keep_frames, size=(height, width), fps=rate, limits=self.limits)
            return given_by_mode("continuation", to_float(kept).unbind(1), frames, height, width)
        ends = [picture(path) for path in (self.image, self.last_image) if path is not None]
        return given_by_mode(self.mode, ends, frames, height, width)

    def contents(self) -> dict[str, str]:
        """A hash of each file's content, which says what was given wherever the file lies."""
        return {key: hashlib.sha256(path.read_bytes()).hexdigest()[:32] for key, path in self.files.items()}
