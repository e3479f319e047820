"""How far a video is, and a way to end the work on it."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

STEPS = ("encode", "denoise", "decode")


@dataclass(frozen=True)
class Progress:
    """How far one of STEPS is: `done` pieces of `total`.

    Pieces are encoded texts and conditions, calls of the model, and decoded frames. `state` is the noisy latent after a
    call of the model, `B C T H W`; None elsewhere.
    """

    step: str
    done: int
    total: int
    state: Tensor | None = None

    @property
    def part(self) -> float:
        """The part of all steps that is done, 0 to 1; almost all of the time goes into calls of the model."""
        begin, end = {"encode": (0.0, 0.02), "denoise": (0.02, 0.9), "decode": (0.9, 1.0)}[self.step]
        return begin + (end - begin) * self.done / self.total


Watch = Callable[[Progress], None]
"""Told how far the work is, before the first piece of a step and after each one.

Where it raises an exception, such as `osp.errors.Stopped`, the work ends between two pieces.
"""


def unwatched(progress: Progress) -> None:
    """Watches nothing."""
