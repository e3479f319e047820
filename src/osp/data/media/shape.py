"""The size of a clip, and of its latent."""

from dataclasses import dataclass
from typing import NamedTuple

from osp.errors import UsageError


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

    def patched(self, patch_size: int) -> "Strides":
        """The strides from pixels to the tokens of a transformer whose patches have so many latent pixels a side."""
        return Strides(self.time, self.space * patch_size)

    def latent(self, frames: int, height: int, width: int) -> Shape:
        """The size of the latent of such a clip."""
        return Shape(self.latent_frames(frames), height // self.space, width // self.space)

    def pixels(self, frames: int, height: int, width: int) -> Shape:
        """The size of the clip that such a latent decodes to."""
        return Shape(self.pixel_frames(frames), height * self.space, width * self.space)

    def latent_frames(self, frames: int) -> int:
        """The latent frames of a clip of so many frames, rounded up."""
        return 1 + -(-(frames - 1) // self.time)

    def pixel_frames(self, latent_frames: int) -> int:
        """The frames that so many latent frames decode to."""
        return 1 + (latent_frames - 1) * self.time

    def missing_frames(self, frames: int) -> int:
        """How many times the last frame of such a clip must be repeated to fill its latent."""
        return self.pixel_frames(self.latent_frames(frames)) - frames

    def whole_frames(self, frames: int) -> int:
        """The most frames that fill a latent and are no more than so many."""
        return 1 + (frames - 1) // self.time * self.time

    def fits(self, frames: int, height: int, width: int) -> bool:
        """Whether such a clip has a latent and fills it: nothing is repeated, nothing left over."""
        latent = self.latent(frames, height, width)
        return frames >= 1 and min(latent) >= 1 and self.pixels(*latent) == (frames, height, width)

    def check_frames(self, frames: int) -> None:
        """Raise UsageError naming the nearest lengths, unless a clip of so many frames fills its latent."""
        if frames < 1 or self.missing_frames(frames):
            whole = self.whole_frames(max(frames, 1))
            near = f"{whole} or {whole + self.time}" if frames > 1 else "1"
            raise UsageError(f"frames={frames}: must be 1 + a multiple of {self.time}, the VAE's stride; use {near}")

    def check_sides(self, height: int, width: int, whose: str = "the VAE's stride") -> None:
        """Raise UsageError naming the nearest sides, unless both are multiples of `space`, which is `whose`."""
        for name, side in (("height", height), ("width", width)):
            if side < self.space or side % self.space:
                whole = max(1, side // self.space) * self.space
                near = f"{whole} or {whole + self.space}" if side > self.space else f"{whole}"
                raise UsageError(f"{name}={side}: must be a multiple of {self.space}, {whose}; use {near}")
