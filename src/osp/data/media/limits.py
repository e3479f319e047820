"""The limits to one file: how many pixels, frames, seconds and bytes it may cost whoever reads it."""

from dataclasses import dataclass, fields

from osp.checks import check_number


@dataclass(frozen=True)
class Limits:
    """What one file may cost. What its headers promise is compared with these before anything is allocated.

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


DEFAULT_LIMITS = Limits()
