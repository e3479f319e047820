"""Which frames of a clip are given and which are generated: the six kinds of v1.3, and the mixtures it trained on.

A frame mask is `T` or `B T`: 1 where a frame is to be generated, 0 where it is kept (Open-Sora Plan report v1.3,
"image condition controller").
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from osp.checks import check_choice, check_number
from osp.conditioning.frames import add_condition_noise, masked_video, spread
from osp.conditioning.given import GivenFrames
from osp.errors import UsageError

LEAST_FRAMES: Mapping[str, int] = MappingProxyType(
    {"text": 1, "clear": 1, "first": 2, "transition": 3, "continuation": 2, "random": 2}
)
"""The kinds, and the least frames of a clip with which one has something to keep and, but for `clear`, to generate.

`text`: nothing is kept; `clear`: everything; `first`: the first frame; `transition`: first and last; `continuation`:
the first n; `random`: any n.
"""
KINDS = tuple(LEAST_FRAMES)


def keep(frames: int, kept: Iterable[int]) -> Tensor:
    """The mask `T` of a clip that keeps these frames."""
    mask = torch.ones(frames)
    mask[list(kept)] = 0
    return mask


def frame_mask(kind: str, frames: int, generator: torch.Generator, least_kept: float = 0.0) -> Tensor:
    """A mask `T` of this kind. `continuation` and `random` draw how many frames they keep, and which.

    They keep the share `least_kept` of the frames at least, one in any case, and leave one at least to generate.
    Raises UsageError for a kind that is unknown or impossible with so few frames.
    """
    check_choice("masks: kind", kind, KINDS)
    if frames < LEAST_FRAMES[kind]:
        raise UsageError(f"frame mask {kind!r} needs {LEAST_FRAMES[kind]} frames, the clip has {frames}")
    match kind:
        case "text":
            return keep(frames, ())
        case "clear":
            return keep(frames, range(frames))
        case "first":
            return keep(frames, (0,))
        case "transition":
            return keep(frames, (0, frames - 1))
    least = min(frames - 1, max(1, math.ceil(least_kept * frames)))
    count = int(torch.randint(least, frames, (), generator=generator, device=generator.device))
    if kind == "continuation":
        return keep(frames, range(count))
    return keep(frames, torch.randperm(frames, generator=generator, device=generator.device)[:count].tolist())


@dataclass(frozen=True)
class MaskMix:
    """How often each kind of mask is drawn, by weights of any sum, and the least share of frames that is kept.

    Where a clip is too short for some kinds, as an image is for all but `text` and `clear`, the others share their
    part; where none is left it is `text`. Raises UsageError for unknown kinds and impossible numbers.
    """

    weights: Mapping[str, float]
    least_kept: float = 0.0

    def __post_init__(self) -> None:
        for kind in self.weights:
            check_choice("masks: kind", kind, KINDS)
        values = list(self.weights.values())
        if not all(0 <= value < math.inf for value in values) or not sum(values) > 0:
            raise UsageError(f"frame masks: the weights {dict(self.weights)} must not be negative, nor all zero")
        check_number("masks: least_kept", self.least_kept, 0, below=1)

    def draw_kind(self, frames: int, generator: torch.Generator) -> str:
        """A kind that a clip of so many frames can have; takes one number of the generator."""
        weights = {kind: self.weights.get(kind, 0) for kind in KINDS if frames >= LEAST_FRAMES[kind]}
        left = sum(weights.values()) * torch.rand((), generator=generator, device=generator.device).double().item()
        for kind, weight in weights.items():
            if left < weight:
                return kind
            left -= weight
        return "text" if not any(weights.values()) else max(weights, key=lambda kind: weights[kind])

    def draw(self, frames: int, generators: Sequence[torch.Generator]) -> tuple[Tensor, list[str]]:
        """Masks `B T` and their kinds, each drawn with the sample's own generator."""
        kinds = [self.draw_kind(frames, generator) for generator in generators]
        masks = [
            frame_mask(kind, frames, generator, self.least_kept)
            for kind, generator in zip(kinds, generators, strict=True)
        ]
        return torch.stack(masks), kinds

    def draw_given(self, video: Tensor, generators: Sequence[torch.Generator], noise: bool = False) -> GivenFrames:
        """The frames of clips `B 3 T H W` in [-1, 1] that are given, drawn; with `noise`, the kept ones have some.

        Each is drawn with the sample's own generator: first the kind, then the frames, then `add_condition_noise`.
        """
        drawn, _ = self.draw(video.shape[2], generators)
        mask = spread(drawn.to(video.device), *video.shape[3:])
        kept = add_condition_noise(video, mask, generators) if noise else video
        return GivenFrames(mask, masked_video(kept, mask))


_MOSTLY_GIVEN = {"text": 10, "continuation": 40, "random": 40, "clear": 10}
_HARDER = {"text": 10, "continuation": 25, "random": 60, "clear": 5}
_V12 = {"first": 40, "transition": 40, "continuation": 10, "random": 10}
_FIRST_FRAMES = {"text": 5, "continuation": 5, "random": 10, "first": 40, "transition": 40}

MIXES: Mapping[str, MaskMix] = MappingProxyType(
    {
        "step1": MaskMix(_MOSTLY_GIVEN, least_kept=0.5),
        "step2": MaskMix(_MOSTLY_GIVEN, least_kept=0.25),
        "step3": MaskMix(_MOSTLY_GIVEN, least_kept=0.125),
        "step4": MaskMix(_HARDER, least_kept=0.125),
        "step5": MaskMix(_HARDER),
        "step6": MaskMix({"text": 10, "continuation": 10, "random": 20, "first": 40, "transition": 20}),
        "step7": MaskMix(_FIRST_FRAMES),
        "stage2": MaskMix(_FIRST_FRAMES),
        "shipped": MaskMix({"text": 1, "first": 8, "transition": 8, "continuation": 2, "random": 1}),
        "text": MaskMix({"text": 1}),
        "v12": MaskMix(_V12),
    }
)
"""The mixtures of v1.3's inpainting model, from much given to little: seven steps by samples seen (4, 4, 4, 4, 8, 16
and 10 million), the second stage at higher resolution (15 million), and what its configuration was shipped with; and
`v12`, that of v1.2's image-to-video model."""


def find_mix(mix: str | MaskMix | Mapping[str, float]) -> MaskMix:
    """A mixture by its name in MIXES, or by its weights. Raises UsageError for an unknown name."""
    if isinstance(mix, MaskMix):
        return mix
    if isinstance(mix, str):
        check_choice("masks", mix, MIXES)
        return MIXES[mix]
    return MaskMix({str(kind): mix[kind] for kind in mix})
