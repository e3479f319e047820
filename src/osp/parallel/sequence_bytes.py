"""The bytes that processes send each other for a denoiser's split tokens, counted from the layouts; nothing is sent."""

from collections import Counter
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from osp.denoiser import Denoiser, Grid
from osp.denoiser.attention import QKV, TokenBatch
from osp.denoiser.patterns import Pattern
from osp.denoiser.placement import Attend, Placement
from osp.parallel.sequence import check_splits
from osp.parallel.sequence_layout import moved_tokens, plan_layouts


@torch.no_grad()
def exchanged_bytes(
    model: Denoiser, latent: Sequence[int], text: int, ranks: int, batch: int = 1
) -> tuple[Counter[str], Grid]:
    """The bytes of one forward pass, by what they are for, that all processes send together; and the grid of tokens.

    `model` is on the meta device, in the type that it computes in; `latent` are its frames, height and width. A
    backward pass sends as much again, and so does each block that it computes again, but for the tokens that move
    between blocks. Raises UsageError for a model that cannot be split so, and for inputs that do not fit.
    """
    check_splits(model, ranks)
    sent: Counter[str] = Counter()
    dtype = model.out.weight.dtype
    with torch.device("meta"):
        inputs = [torch.empty(batch, model.latent_channels, *latent, dtype=dtype), torch.empty(batch)]
        inputs += [torch.empty(batch, text, model.text_channels, dtype=dtype)]
        pooled = None if model.pooled_channels is None else torch.empty(batch, model.pooled_channels, dtype=dtype)
    grid = model.check(*inputs, None, pooled, None)  # type: ignore[call-arg]
    before, model.placement = model.placement, partial(CountedTokens, sent, ranks)
    try:
        model(*inputs, pooled_text=pooled)
    finally:
        model.placement = before
    return sent, grid


class CountedTokens(Placement):
    """All tokens lie here, and what `SplitTokens` would send is counted; of the attention only the shapes are made."""

    def __init__(self, sent: Counter[str], ranks: int, schedule: Sequence[Pattern], tokens: TokenBatch) -> None:
        self.sent, self.ranks, self.schedule = sent, ranks, schedule
        self.layouts = plan_layouts(tuple(schedule), tokens.grid, ranks)

    def moved(self, tokens: Tensor, before: int, block: int) -> Tensor:
        """See `Placement`."""
        changing = moved_tokens(self.layouts[before], self.layouts[block])
        self.sent["tokens"] += changing * _bytes(tokens[:, :1])
        return tokens

    def attention(self, block: int) -> Attend:
        """See `Placement`."""
        return self._whole if self.layouts[block].pattern == self.schedule[block] else self._split

    def gathered(self, tokens: Tensor) -> Tensor:
        """See `Placement`."""
        self.sent["prediction"] += (self.ranks - 1) * _bytes(tokens)
        return tokens

    def _whole(self, video: QKV, text: QKV | None = None) -> tuple[Tensor, Tensor | None]:
        if text is not None:
            self.sent["text"] += 2 * (self.ranks - 1) * _bytes(text[2]) // self.ranks * self.ranks
        return video[2], None if text is None else text[2]

    def _split(self, video: QKV, text: QKV | None = None) -> tuple[Tensor, Tensor | None]:
        # Queries, keys, values and the output: of each the part of the heads or tokens that other processes want.
        self.sent["heads"] += sum(map(_bytes, (*video, video[2]))) * (self.ranks - 1) // self.ranks
        if text is not None:
            self.sent["text"] += (self.ranks - 1) * _bytes(text[2])
        return video[2], None if text is None else text[2]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
