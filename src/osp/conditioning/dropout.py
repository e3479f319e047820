"""Text dropout: in training some prompts give way to the empty one, for classifier-free guidance.

Ho and Salimans, arXiv:2207.12598. The rate of v1.3 is 0.1. For v1.5 none is published; its two encoders read the same
prompt here, so both lose it together.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from osp.checks import check_number


def draw_dropped(rate: float, generators: Sequence[torch.Generator]) -> Tensor:
    """Which samples lose their text, bool `B`; each is drawn with the sample's own generator, of which it takes one.

    Raises UsageError for a rate outside 0 to 1.
    """
    check_number("text_dropout", rate, 0, 1)
    drawn = [torch.rand((), generator=g, device=g.device).item() < rate for g in generators]
    return torch.tensor(drawn, dtype=torch.bool)


def drop_prompts(prompts: Sequence[str], dropped: Tensor) -> list[str]:
    """The prompts, with "" for those dropped (bool `B`); `EncodedText.replaced` does so to encoded ones."""
    return ["" if drop else prompt for prompt, drop in zip(prompts, dropped.tolist(), strict=True)]
