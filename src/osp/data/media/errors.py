"""The error of one clip, which costs that clip and never the run."""

from osp.errors import DataError


class ClipError(DataError):
    """A clip that cannot be read; `str()` is one line, "NAME: reason"."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def told(error: BaseException) -> str:
    """The reason that libav, the system or Pillow gives, without codes and file names, on one line."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(reason).split())
