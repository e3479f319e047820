"""Does a video show what its prompt says? The oracle of procedural clips judges colour, shape and motion."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from scipy.stats import binomtest
from torch import Tensor

from osp.data.procedural.oracle import Reading, read
from osp.data.procedural.scene import COLOURS, MOTIONS, SHAPES, read_caption

PARTS = ("colour", "shape", "motion")
_WORDS = (COLOURS, SHAPES, MOTIONS)

CHANCE = {"all": 1 / math.prod(map(len, _WORDS))} | {
    part: 1 / len(words) for part, words in zip(PARTS, _WORDS, strict=True)
}
"""The rates of videos that show any colour, shape and motion equally often, whatever the prompt: exact."""


@dataclass(frozen=True)
class Rate:
    """So many right ones of so many, with the 95 % confidence interval of Wilson (1927)."""

    right: int
    count: int

    @property
    def rate(self) -> float:
        """The share that is right; NaN for none at all."""
        return self.right / self.count if self.count else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end. Unlike the usual interval it lies within 0..1, and is not empty at 0 or 1."""
        if not self.count:
            return 0.0, 1.0
        low, high = binomtest(self.right, self.count).proportion_ci(method="wilson")
        return float(low), float(high)

    def plain(self) -> dict[str, float]:
        """The rate as plain values: `rate`, `low`, `high`, `right`, `count`."""
        low, high = self.interval
        return {"rate": self.rate, "low": low, "high": high, **asdict(self)}


@dataclass(frozen=True)
class Judgement:
    """A prompt, the look that it asks for (`truth`), and the look that the oracle sees (`seen`)."""

    prompt: str
    truth: Reading
    seen: Reading

    def right(self) -> dict[str, bool]:
        """Whether each of PARTS is as the prompt says, and `all` of them."""
        parts = {part: getattr(self.seen, part) == getattr(self.truth, part) for part in PARTS}
        return {"all": all(parts.values()), **parts}


def truth(prompt: str) -> Reading:
    """The look that this prompt asks for. Raises UsageError as `osp.data.procedural.scene.read_caption`."""
    asked = read_caption(prompt)
    return Reading(asked.colour, asked.shape, asked.motion)


def judge(video: Tensor, prompt: str) -> Judgement:
    """A clip `C T H W` (uint8, or float in [-1, 1]) against the prompt it was made for, or its caption.

    Raises UsageError for a prompt that does not name one object by colour, shape and motion.
    """
    return Judgement(prompt, truth(prompt), read(video))


def accuracy(judgements: Sequence[Judgement]) -> dict[str, Rate]:
    """How often `all`, and each of PARTS, is right."""
    verdicts = [judgement.right() for judgement in judgements]
    return {part: Rate(sum(verdict[part] for verdict in verdicts), len(verdicts)) for part in ("all", *PARTS)}


def shuffled_accuracy(judgements: Sequence[Judgement]) -> dict[str, float]:
    """The rates for prompts of other videos: the mean over every video with every prompt but its own.

    It is the chance level of these very prompts and videos, which CHANCE is for even ones. NaN for less than two.
    """
    pairs = [
        Judgement(other.prompt, other.truth, one.seen)
        for i, one in enumerate(judgements)
        for j, other in enumerate(judgements)
        if i != j
    ]
    return {part: rate.rate for part, rate in accuracy(pairs).items()}
