"""Exchanges of processes within a model's forward and backward pass, and a count of their bytes.

The backward pass of each is its transpose: that of the sum of all processes' losses.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class Exchange:
    """The exchange between the processes of one group, of which each computes a part of one clip.

    `sent` counts the bytes that this process has sent to others, by what they were for. A sum over n processes counts
    as 2 (n - 1) / n times the tensor, which is what each sends in a ring.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.sent: Counter[str] = Counter()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Exchange":
        """Itself: the copy of a model works in the same processes."""
        return self

    @torch.compiler.disable
    def swapped(self, rows: Tensor, given: Sequence[int], taken: Sequence[int], use: str) -> Tensor:
        """`N ...`, of which `given[i]` rows go to process i -> `M ...`, of which `taken[i]` come from it, in order."""
        return _Swap.apply(rows, tuple(given), tuple(taken), use, self)

    @torch.compiler.disable
    def summed(self, value: Tensor, use: str) -> Tensor:
        """The sum of a tensor over all processes."""
        return _Sum.apply(value, use, self)

    def from_first(self, value: Tensor, use: str) -> Tensor:
        """The first process's tensor, in all of them; the others give one of its shape and type, which is filled."""
        dist.broadcast(value, group=self.group, group_src=0)
        self.sent[use] += 0 if self.rank else (self.size - 1) * value.numel() * value.element_size()
        return value

    def gathered(self, rows: Tensor, counts: Sequence[int], use: str) -> Tensor:
        """`N ...` -> the rows of all processes, one after another, of which each has `counts`."""
        own = counts[self.rank]
        return self.swapped(rows.repeat(self.size, *[1] * (rows.ndim - 1)), [own] * self.size, counts, use)


class _Swap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, given: tuple[int, ...], taken: tuple[int, ...], use: str, over: Exchange
    ) -> Tensor:
        ctx.settings = given, taken, use, over
        return _swap(rows, given, taken, use, over)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        given, taken, use, over = ctx.settings
        return _swap(gradient, taken, given, use, over), None, None, None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, use: str, over: Exchange) -> Tensor:
        ctx.settings = use, over
        return _sum(value, use, over)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _sum(gradient, *ctx.settings), None, None


def _swap(rows: Tensor, given: tuple[int, ...], taken: tuple[int, ...], use: str, over: Exchange) -> Tensor:
    out = rows.new_empty(sum(taken), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), list(taken), list(given), group=over.group)
    row = rows[:1].numel() if len(rows) else out[:1].numel()
    over.sent[use] += (sum(given) - given[over.rank]) * row * rows.element_size()
    return out


def _sum(value: Tensor, use: str, over: Exchange) -> Tensor:
    total = value.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=over.group)
    over.sent[use] += 2 * (over.size - 1) * total.numel() * total.element_size() // over.size
    return total
