"""The limits to one file: how many pixels, frames, seconds and bytes it may cost whoever reads it."""

from dataclasses import dataclass, fields

from osp.checks import check_number
from osp.data.media.errors import ClipError


@dataclass(frozen=True)
class Limits:
    """The most that one file may cost. What its headers promise is compared with these before anything is allocated.

    Raises UsageError for a limit that is no number above 0.
    """

    frame_pixels: int = 64 << 20  # width x height: 8192 x 8192
    frames: int = 1 << 20  # of one file: almost 5 hours at 60 a second
    seconds: float = 12 * 3600.0
    member_bytes: int = 16 << 30  # of one member of a tar, or of a file that is read as a whole
    caption_characters: int = 32768

    def __post_init__(self) -> None:
        for field in fields(self):
            check_number(f"limits.{field.name}", getattr(self, field.name), above=0, whole=field.type is int)

    def check_pixels(self, name: str, width: int, height: int, what: str = "its frames are") -> None:
        """Raise ClipError for a picture of more pixels than `frame_pixels`."""
        if width * height > self.frame_pixels:
            self._refuse(name, f"{what} {width} x {height}, {width * height} pixels", "frame_pixels")

    def check_frames(self, name: str, frames: int) -> None:
        """Raise ClipError for more frames than `frames`."""
        if frames > self.frames:
            self._refuse(name, f"has {frames} frames or more", "frames")

    def check_seconds(self, name: str, seconds: float) -> None:
        """Raise ClipError for a longer time than `seconds`."""
        if seconds > self.seconds:
            self._refuse(name, f"lasts {seconds:g} s or longer", "seconds")

    def check_bytes(self, name: str, size: int) -> None:
        """Raise ClipError for more bytes than `member_bytes`."""
        if size > self.member_bytes:
            self._refuse(name, f"has {size} bytes", "member_bytes")

    def _refuse(self, name: str, finding: str, key: str) -> None:
        raise ClipError(name, f"{finding}, more than limits.{key}={getattr(self, key)}; raise that setting to read it")


DEFAULT_LIMITS = Limits()
