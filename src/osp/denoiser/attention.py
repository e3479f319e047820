"""Attention inside the groups of a pattern."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from osp.denoiser.grid import Grid
from osp.denoiser.patterns import Pattern
from osp.devices import attention

QKV = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class TokenBatch:
    """A batch of tokens, as a denoiser's attention has to know it.

    The masks, of the video (`B N`) and of the text in the patterns' attention (`B L`), are True where a token is real,
    None where all are. `text` is the length L of that text, 0 where attention is among video tokens only. The attention
    of the patterns in `unmasked` takes no notice of the video's mask.
    """

    grid: Grid
    batch: int
    device: torch.device
    video_mask: Tensor | None = None
    text_mask: Tensor | None = None
    text: int = 0
    unmasked: frozenset[Pattern] = frozenset()

    def seen_by(self, pattern: Pattern) -> "TokenBatch":
        """The batch as the attention of a pattern takes it."""
        return replace(self, video_mask=None) if pattern in self.unmasked else self


class GroupAttention:
    """The attention of one pattern over one batch: what all blocks with this pattern have in common.

    Padding that a pattern adds is left out of the groups that have it, not masked.
    """

    def __init__(self, pattern: Pattern, tokens: TokenBatch) -> None:
        grid, device, text, text_mask = tokens.grid, tokens.device, tokens.text, tokens.text_mask
        self.pattern, self.grid = pattern, grid
        self.places = pattern.split(grid).shape[1]
        self.runs = pattern.runs(grid)
        video_mask = None if tokens.video_mask is None else pattern.arrange(tokens.video_mask, grid)
        self.key_padding: list[Tensor | None] = []
        self.alive: list[Tensor | None] = []
        for run in self.runs:
            shape = (tokens.batch, run.stop - run.start)
            real = None if run.real is None else run.real.to(device).expand(*shape, -1)
            alive = None
            if video_mask is not None:
                real = video_mask[:, run.start : run.stop, : run.length]  # False where the pattern filled up
                if run.length < self.places and not text:
                    # A group that was filled up and holds no real token attends to zeros in the published models.
                    alive = real.any(dim=2)[:, :, None, None, None]
            if text and not (real is None and text_mask is None):
                if real is None:
                    real = torch.ones(*shape, run.length, dtype=torch.bool, device=device)
                every = torch.ones(tokens.batch, text, dtype=torch.bool, device=device)
                words = every if text_mask is None else text_mask
                real = torch.cat((real, words[:, None].expand(*shape, -1)), dim=2)
            self.key_padding.append(None if real is None else real.flatten(0, 1))
            self.alive.append(alive)

    def __call__(self, video: QKV, text: QKV | None = None) -> tuple[Tensor, Tensor | None]:
        """Queries, keys and values of video tokens, each `B N H D`, and of text, `B L H D` -> `B N H D` and `B L H D`.

        Text takes part in every group; what it gets is the mean over them.
        """
        batch, text_sum = len(video[0]), None
        arranged = [self.pattern.arrange(x, self.grid) for x in video]
        outputs = []
        for run, key_padding, alive in zip(self.runs, self.key_padding, self.alive, strict=True):
            parts = [x[:, run.start : run.stop, : run.length] for x in arranged]
            if text is not None:
                groups = parts[0].shape[1]
                parts = [
                    torch.cat((x, t[:, None].expand(-1, groups, -1, -1, -1)), dim=2)
                    for x, t in zip(parts, text, strict=True)
                ]
            q, k, v = (x.flatten(0, 1) for x in parts)
            out = attention(q, k, v, key_padding).unflatten(0, (batch, -1))
            if text is not None:
                text_out = out[:, :, run.length :].sum(dim=1)
                text_sum = text_out if text_sum is None else text_sum + text_out
                out = out[:, :, : run.length]
            if alive is not None:
                out = out * alive
            if run.length < self.places:
                out = F.pad(out, (0, 0, 0, 0, 0, self.places - run.length))
            outputs.append(out)
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return self.pattern.restore(out, self.grid), None if text_sum is None else text_sum / out.shape[1]
