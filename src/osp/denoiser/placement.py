"""Where the video tokens of one call lie: the seam at which they are split over processes from outside."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from osp.denoiser.attention import QKV, GroupAttention, TokenBatch
from osp.denoiser.patterns import Pattern

Tables = tuple[Tensor, Tensor]


class Attend(Protocol):
    """The attention of a block over the video tokens that lie here, and over text where it takes part."""

    def __call__(self, video: QKV, text: QKV | None = None) -> tuple[Tensor, Tensor | None]:
        """See `GroupAttention`."""
        ...


class Placement:
    """All tokens of a call lie here, in their own order, so that nothing has to be moved.

    A denoiser hands its tokens through these methods, block by block, and takes the attention of its blocks from here.
    `osp.parallel.split_sequence` installs another class, of which each process holds a part of the tokens.
    """

    def __init__(self, schedule: Sequence[Pattern], tokens: TokenBatch) -> None:
        self.schedule = schedule
        self._attentions: dict[Any, Attend] = {
            pattern: GroupAttention(pattern, tokens.seen_by(pattern)) for pattern in dict.fromkeys(schedule)
        }

    def split(self, tokens: Tensor) -> Tensor:
        """All tokens `B N D` -> those here, lying as the first block takes them."""
        return tokens

    def moved(self, tokens: Tensor, before: int, block: int) -> Tensor:
        """Tokens `B N D` that lie as block `before` takes and leaves them -> as another block takes them."""
        return tokens

    def cut(self, tables: Tables, block: int) -> Tables:
        """Tables `N ...` of all tokens -> their rows for the tokens that lie here in a block."""
        return tables

    def attention(self, block: int) -> Attend:
        """The attention of a block."""
        return self._attentions[self.schedule[block]]

    def gathered(self, tokens: Tensor) -> Tensor:
        """Tokens `B N D` as the last block leaves them -> all of them, in their own order."""
        return tokens
