"""The grid that tokens come from."""

from typing import NamedTuple


class Grid(NamedTuple):
    """How many tokens there are along each axis; they are ordered by frame, then row, then column."""

    frames: int
    height: int
    width: int

    @property
    def tokens(self) -> int:
        """The number of tokens: frames x height x width."""
        return self.frames * self.height * self.width
