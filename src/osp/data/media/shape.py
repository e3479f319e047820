"""The size of a clip, and of its latent."""

from dataclasses import dataclass
from typing import NamedTuple


class Shape(NamedTuple):
    """Size of a clip, in frames and pixels; or of a latent, in latent frames and latent pixels."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


@dataclass(frozen=True)
class Strides:
    """A causal video VAE's down-sampling: `time` frames make a latent frame, `space` x `space` pixels a latent pixel.

    The first frame has a latent frame of its own, so clips have 1 + a multiple of `time` frames. In a clip of another
    length the last frame stands for those that are missing, so that the number of latent frames is rounded up.
    """

    time: int
    space: int

    def latent(self, frames: int, height: int, width: int) -> Shape:
        """The size of the latent of such a clip."""
        return Shape(1 + -(-(frames - 1) // self.time), height // self.space, width // self.space)

    def pixels(self, frames: int, height: int, width: int) -> Shape:
        """The size of the clip that such a latent decodes to."""
        return Shape(1 + (frames - 1) * self.time, height * self.space, width * self.space)

    def fits(self, frames: int, height: int, width: int) -> bool:
        """Whether such a clip fills its latent: nothing is repeated, nothing left over."""
        return frames >= 1 and self.pixels(*self.latent(frames, height, width)) == (frames, height, width)
