"""Encoded prompts, and what every text encoder offers."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osp.checks import check_number
from osp.conditioning.cleaning import find_cleaning
from osp.data.features.format import TextIdentity
from osp.errors import UsageError

log = logging.getLogger(__name__)

_SHOWN = 40  # characters of a prompt in a message


@dataclass(frozen=True)
class EncodedText:
    """A batch of prompts as a denoiser takes them.

    `text` `B L D`; `mask` `B L`, True where a token is real, and every prompt has one at least; `pooled` `B P`, one
    vector for the whole of a prompt, or None. Padding stands at the end and says nothing, so it may be cut or added.
    """

    text: Tensor
    mask: Tensor
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, rows: slice | Tensor) -> "EncodedText":
        """Some of the prompts, without the padding that none of them needs."""
        mask = self.mask[rows]
        length = int(mask.sum(dim=1).max()) if len(mask) else 0
        pooled = None if self.pooled is None else self.pooled[rows]
        return EncodedText(self.text[rows, :length], mask[:, :length], pooled)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "EncodedText":
        """The same elsewhere; `dtype` is that of text and pooled text."""
        pooled = None if self.pooled is None else self.pooled.to(device, dtype)
        return EncodedText(self.text.to(device, dtype), self.mask.to(device), pooled)

    def padded(self, length: int) -> "EncodedText":
        """The same text with padding up to `length` tokens, if there are fewer."""
        more = max(0, length - self.text.shape[1])
        return EncodedText(F.pad(self.text, (0, 0, 0, more)), F.pad(self.mask, (0, more)), self.pooled)

    def replaced(self, rows: Tensor, other: "EncodedText") -> "EncodedText":
        """The same text with prompts of `other` (`B`, or one for all) where `rows` (bool, `B`) is True."""
        length = max(self.text.shape[1], other.text.shape[1])
        mine, other = self.padded(length), other.padded(length)
        rows = rows.to(self.text.device)
        text = torch.where(rows[:, None, None], other.text, mine.text)
        mask = torch.where(rows[:, None], other.mask, mine.mask)
        if mine.pooled is None or other.pooled is None:
            return EncodedText(text, mask, mine.pooled)
        return EncodedText(text, mask, torch.where(rows[:, None], other.pooled, mine.pooled))


class TextEncoder(Protocol):
    """Prompts -> EncodedText: all that is asked of an encoder.

    A class that derives from this one has `networks`, `settings` and `identities` by default.

    Attributes:
        channels: the width of a token.
        pooled_channels: that of the pooled text; None: there is none.
        max_tokens: how many tokens of a prompt are read.
        trained: whether it learns along with the denoiser. Only what another one gives may be kept in a cache.
        cleaning, prompt_cleaning: the names of the cleanings (`osp.conditioning.cleaning`) that captions go through
            before they are encoded in training, and prompts in sampling; `clean_texts` does so.
    """

    name: str
    channels: int
    pooled_channels: int | None
    max_tokens: int
    trained: bool
    cleaning: str = "none"
    prompt_cleaning: str = "none"

    def __call__(self, prompts: Sequence[str], strict: bool = False) -> EncodedText:
        """The prompts as they are, encoded; "" is the empty one, which guidance and dropout set beside a real one.

        A prompt that is too long is a UsageError if `strict`, else it is cut, and the first time that is logged.
        """
        ...

    def with_negative(self, prompts: Sequence[str], negative: str) -> tuple[EncodedText, EncodedText]:
        """Prompts of a user, and what guidance leads each of them away from: two batches of one size and length.

        Raises UsageError for a prompt that is too long.
        """
        encoded, last = self([*prompts, negative], strict=True), len(prompts)
        rows = torch.full((last,), last, device=encoded.text.device)
        length = encoded.text.shape[1]
        return encoded[:last].padded(length), encoded[rows].padded(length)

    def to(self, device: torch.device | str) -> object:
        """Move the encoder."""
        ...

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """How many tokens each prompt has, whatever `max_tokens` is; with those that mark its ends."""
        ...

    def fingerprint(self) -> str:
        """One line that changes when the encoder would give something else, for caches."""
        ...

    def networks(self) -> Sequence[nn.Module]:
        """The networks that work in it: what `to` moves, and what takes memory."""
        return ()

    @property
    def settings(self) -> Mapping[str, Any]:
        """The keyword arguments that build one which is trained along again; empty for one that is not."""
        return {}

    def identities(self) -> tuple[TextIdentity | None, TextIdentity | None]:
        """The identities of text and pooled text in features of this encoder; None for one that is not in features."""
        if self.trained:
            return None, None
        identity = TextIdentity(self.name, self.fingerprint(), self.channels)
        return identity, None if self.pooled_channels is None else replace(identity, width=self.pooled_channels)


def clean_texts(texts: Sequence[str], cleaning: str) -> list[str]:
    """The texts after the cleaning of this name. Raises UsageError for a name that is not known."""
    return [*map(find_cleaning(cleaning), texts)]


class LengthCheck:
    """The check of prompts for more tokens than an encoder reads; it warns once and remembers that."""

    def __init__(self, name: str, max_tokens: int) -> None:
        check_number(f"{name}: max_tokens", max_tokens, 2, whole=True)  # one word and the end
        self.name, self.max_tokens, self.said = name, max_tokens, False

    def __call__(self, prompts: Sequence[str], counts: Sequence[int], strict: bool) -> None:
        """Raises UsageError about the first prompt that is too long, if `strict`; else logs once."""
        for prompt, count in zip(prompts, counts, strict=True):
            if count <= self.max_tokens:
                continue
            start = prompt[:_SHOWN] + ("..." if len(prompt) > _SHOWN else "")
            about = f"the prompt {start!r} has {count} tokens, and {self.name} reads {self.max_tokens}"
            if strict:
                raise UsageError(f"{about}; shorten it")
            if not self.said:
                self.said = True
                log.warning("%s; the rest of it is cut off, as of other long prompts (said once)", about)
