"""A denoiser whose video tokens are split over processes, for one clip that is too long for one device.

Where the groups of a pattern can lie whole in the processes, its attention needs no exchange, and the tokens move once
from one block's groups to the next one's. Otherwise the heads are split for the attention: queries, keys, values and
the output move, as in DeepSpeed Ulysses (arXiv:2309.14509). Text is in all processes.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from osp.denoiser import Denoiser
from osp.denoiser.attention import QKV, GroupAttention, TokenBatch
from osp.denoiser.patterns import Pattern
from osp.denoiser.placement import Attend, Placement, Tables
from osp.errors import UsageError
from osp.parallel.exchange import Exchange
from osp.parallel.sequence_groups import local_groups
from osp.parallel.sequence_layout import Layout, plan_layouts, plan_move


def split_sequence(denoiser: Denoiser, group: dist.ProcessGroup | None = None) -> Exchange:
    """Split the tokens of each call of the denoiser over the processes of a group (None: all of them).

    Each process gives the denoiser the same inputs and gets the same whole prediction; so it is with gradients of the
    sum of all processes' losses. The denoiser's copies are split too. Gives what counts the bytes sent. Raises
    UsageError for a model that cannot be split so.
    """
    over = Exchange(group)
    check_splits(denoiser, over.size)
    denoiser.placement = partial(SplitTokens, over)
    return over


def check_splits(denoiser: Denoiser, ranks: int) -> None:
    """Raise UsageError for a model whose tokens cannot be split over so many processes."""
    family, heads = type(denoiser).__name__, denoiser.config.heads
    if not denoiser.splits_tokens:
        raise UsageError(f"{family}: its tokens cannot be split over processes (splits_tokens); use sequence=1")
    if heads % ranks:
        fit = [str(n) for n in range(1, heads + 1) if heads % n == 0]
        raise UsageError(
            f"sequence={ranks} does not divide the {heads} heads of {family}; use one of {', '.join(fit)} processes"
        )


class SplitTokens(Placement):
    """A part of the video tokens lies in each process; see the module and `Placement`."""

    def __init__(self, over: Exchange, schedule: Sequence[Pattern], tokens: TokenBatch) -> None:
        device = tokens.device
        self.over, self.device = over, device
        self.layouts = plan_layouts(tuple(schedule), tokens.grid, over.size)
        self._here = {one: one.tokens(over.rank).to(device) for one in dict.fromkeys(self.layouts)}
        self._cut: dict[tuple[Layout, int], tuple[Tables, Tables]] = {}  # with the tables that a number stands for
        self._whole: dict[Pattern, GroupAttention] = {}
        self._by_layout: dict[tuple[Pattern, Layout], Attend] = {}
        for pattern, layout in dict.fromkeys(zip(schedule, self.layouts, strict=True)):
            seen = tokens.seen_by(pattern)
            if layout.pattern == pattern:
                mask = None if seen.video_mask is None else seen.video_mask[:, self._here[layout]]
                groups = local_groups(layout, over.rank, device)
                local = GroupAttention(groups, replace(seen, video_mask=mask))
                share = layout.places.groups[over.rank] / sum(layout.places.groups)
                self._by_layout[pattern, layout] = WholeGroups(over, local, share)
            else:
                if pattern not in self._whole:
                    self._whole[pattern] = GroupAttention(pattern, seen)
                self._by_layout[pattern, layout] = SplitHeads(over, self._whole[pattern], layout, device)
        self._attends = [self._by_layout[each] for each in zip(schedule, self.layouts, strict=True)]

    def split(self, tokens: Tensor) -> Tensor:
        """See `Placement`; every process has made all tokens, so that nothing is sent."""
        return tokens.index_select(1, self._here[self.layouts[0]])

    def moved(self, tokens: Tensor, before: int, block: int) -> Tensor:
        """See `Placement`."""
        start, end = self.layouts[before], self.layouts[block]
        if start == end:
            return tokens
        move = plan_move(start, end, self.over.rank, self.device)
        rows = tokens.transpose(0, 1).index_select(0, move.sends)
        if not move.stays:
            rows = self.over.swapped(rows, move.given, move.taken, "tokens")
        return rows.index_select(0, move.order).transpose(0, 1)

    def cut(self, tables: Tables, block: int) -> Tables:
        """See `Placement`."""
        layout = self.layouts[block]
        asked = layout, id(tables[0])
        if asked not in self._cut:
            here = self._here[layout]
            self._cut[asked] = tables, (tables[0].index_select(0, here), tables[1].index_select(0, here))
        return self._cut[asked][1]

    def attention(self, block: int) -> Attend:
        """See `Placement`."""
        return self._attends[block]

    def gathered(self, tokens: Tensor) -> Tensor:
        """See `Placement`."""
        layout = self.layouts[-1]
        rows = self.over.gathered(tokens.transpose(0, 1), layout.places.counts, "prediction")
        return rows.index_select(0, natural(layout, self.device)).transpose(0, 1)


class WholeGroups:
    """Attention inside groups that lie whole in this process, a `share` of all groups."""

    def __init__(self, over: Exchange, local: GroupAttention, share: float) -> None:
        self.over, self.local, self.share = over, local, share

    def __call__(self, video: QKV, text: QKV | None = None) -> tuple[Tensor, Tensor | None]:
        """See `Attend`: text gets the mean over the groups of all processes."""
        out, text_out = self.local(video, text)
        return out, None if text_out is None else self.over.summed(text_out * self.share, "text")


class SplitHeads:
    """Attention of a part of the heads in each process, over all tokens."""

    def __init__(self, over: Exchange, whole: GroupAttention, layout: Layout, device: torch.device) -> None:
        self.over, self.whole, self.counts = over, whole, layout.places.counts
        self.order, self.back = layout.places.order.to(device), natural(layout, device)

    def __call__(self, video: QKV, text: QKV | None = None) -> tuple[Tensor, Tensor | None]:
        """See `Attend`; text has all heads in all processes, before and after."""
        own = None if text is None else tuple(x.tensor_split(self.over.size, dim=2)[self.over.rank] for x in text)
        q, k, v = self._scattered(torch.stack(video, dim=2)).unbind(2)
        out, text_out = self.whole((q, k, v), own)  # type: ignore[arg-type]
        return self._returned(out), None if text_out is None else self._all_heads(text_out)

    def _scattered(self, x: Tensor) -> Tensor:
        """Tokens here, all heads, `B N 3 H D` -> all tokens in their own order, some heads."""
        own = self.counts[self.over.rank]
        rows = x.unflatten(3, (self.over.size, -1)).permute(3, 1, 0, 2, 4, 5).flatten(0, 1)  # (R N) B 3 h D
        rows = self.over.swapped(rows, [own] * self.over.size, self.counts, "heads")
        return rows.index_select(0, self.back).transpose(0, 1)

    def _returned(self, x: Tensor) -> Tensor:
        """All tokens, some heads, `B N h D` -> the tokens here with all heads."""
        own = self.counts[self.over.rank]
        rows = x.transpose(0, 1).index_select(0, self.order)
        rows = self.over.swapped(rows, self.counts, [own] * self.over.size, "heads")
        return rows.unflatten(0, (self.over.size, own)).permute(2, 1, 0, 3, 4).flatten(2, 3)

    def _all_heads(self, x: Tensor) -> Tensor:
        """Text with some heads, `B L h D` -> with all."""
        rows = self.over.gathered(x.transpose(0, 1), [x.shape[1]] * self.over.size, "text")
        return rows.unflatten(0, (self.over.size, -1)).permute(2, 1, 0, 3, 4).flatten(2, 3)


def natural(layout: Layout, device: torch.device) -> Tensor:
    """The places of the tokens in their own order, where those of all processes lie one after another."""
    return layout.places.order.argsort().to(device)
