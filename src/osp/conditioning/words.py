"""A small text encoder that learns along with the denoiser: words spelled in bytes, and a transformer over them.

It needs no files and no vocabulary. A word starts as the sum of a learned vector for each of its bytes at its place
in the word, so that every word has its own from the first step on, and a caption is as many tokens as it has words:
a transformer over single bytes first has to find out what words are, and its text is five times as long. Neighbours
are mixed before the first attention, which by itself is slow to learn that "red" in "red ball" is the ball's.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from osp.checks import check_number
from osp.conditioning.text import EncodedText, LengthCheck, TextEncoder
from osp.denoiser.layers import FeedForward, initialise
from osp.devices import attention
from osp.errors import UsageError
from osp.files import exact_digest

WORD_BYTES = 16  # longer words, and text without spaces, become several tokens
_NONE, _END, _BYTES = 0, 1, 2  # rows of the table: nothing, the end of the prompt, the first byte
_WORD = re.compile(rb"\S{1,%d}" % WORD_BYTES)


class WordText(nn.Module):
    """Prompts -> a token for each word and one for the end; see the module, and `osp.conditioning.TextEncoder`.

    Args:
        channels: width of a token.
        pooled_channels: width of the pooled text, a linear layer over the mean of the tokens; None: there is none.
        layers, heads: of the transformer.
        max_tokens: words of a prompt that are read, and its end.

    `seen` are the words that captions had in training, where a checkpoint tells.

    Raises UsageError for values that make no encoder.
    """

    name = "words"
    trained = True
    cleaning = prompt_cleaning = "none"

    def __init__(
        self,
        channels: int = 192,
        pooled_channels: int | None = 192,
        layers: int = 3,
        heads: int = 4,
        max_tokens: int = 64,
    ) -> None:
        super().__init__()
        for key, value in (("channels", channels), ("layers", layers), ("heads", heads)):
            check_number(f"{self.name}: {key}", value, 1, whole=True)
        if channels % heads:
            raise UsageError(f"{self.name}: channels={channels} cannot be split into heads={heads}")
        self.channels, self.pooled_channels, self.max_tokens = channels, pooled_channels, max_tokens
        self.heads = heads
        self.seen: frozenset[str] | None = None
        self.check_length = LengthCheck(self.name, max_tokens)
        self.spelling = nn.EmbeddingBag(_BYTES + 256 * WORD_BYTES, channels, mode="sum", padding_idx=_NONE)
        self.word_norm = nn.LayerNorm(channels)
        self.word = FeedForward(channels, bias=True)
        self.neighbours = nn.Conv1d(channels, channels, 3, padding=1)
        self.places = nn.Parameter(torch.randn(max_tokens, channels) / channels**0.5)
        self.blocks = nn.ModuleList(WordBlock(channels, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(channels)
        self.pooled = None if pooled_channels is None else nn.Linear(channels, pooled_channels)
        initialise(self)
        # A word of ten bytes starts with values of about 1.
        nn.init.normal_(self.spelling.weight, std=0.3)
        with torch.no_grad():
            self.spelling.weight[_NONE] = 0

    @property
    def settings(self) -> dict[str, int | None]:
        """The settings that build the encoder again, as plain values."""
        return {
            "channels": self.channels,
            "pooled_channels": self.pooled_channels,
            "layers": len(self.blocks),
            "heads": self.heads,
            "max_tokens": self.max_tokens,
        }

    @property
    def parts(self) -> Sequence[nn.Module]:
        """The blocks, which run one after another."""
        return list(self.blocks)

    def forward(self, prompts: Sequence[str], strict: bool = False) -> EncodedText:
        """See `TextEncoder.__call__`."""
        spelled = [_spelled(prompt) for prompt in prompts]
        self.check_length(prompts, [len(words) for words in spelled], strict)
        rows = _table_rows(spelled, self.max_tokens)
        is_padded = bool((rows[..., 0] == _NONE).any())  # found out before it is on the device
        return self.read(rows.to(self.places.device), is_padded)

    def read(self, rows: Tensor, is_padded: bool) -> EncodedText:
        """Words as rows of the table, `B L WORD_BYTES` -> their text; `is_padded` says whether any is none."""
        mask = rows[..., 0] != _NONE
        padding = mask if is_padded else None
        x = self.spelling(rows.flatten(0, 1)).unflatten(0, mask.shape)
        x = (x + self.word(self.word_norm(x))) * mask[..., None]
        mixed = self.neighbours(x.transpose(1, 2)).transpose(1, 2)
        x = x + nn.functional.gelu(mixed) + self.places[: mask.shape[1]]
        for block in self.blocks:
            x = block(x, padding)
        x = self.norm(x) * mask[..., None]
        pooled = None if self.pooled is None else self.pooled(x.sum(dim=1) / mask.sum(dim=1, keepdim=True))
        return EncodedText(x, mask, pooled)

    def with_negative(self, prompts: Sequence[str], negative: str) -> tuple[EncodedText, EncodedText]:
        """See `TextEncoder.with_negative`."""
        return TextEncoder.with_negative(self, prompts, negative)

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """See `TextEncoder.count_tokens`."""
        return [len(_spelled(prompt)) for prompt in prompts]

    def fingerprint(self) -> str:
        """A fingerprint of the settings and the present weights; videos hold it, so its form must not change."""
        weights = [(f"{key} {value.dtype} {tuple(value.shape)}", value) for key, value in self.state_dict().items()]
        return f"{self.name} {exact_digest(f'{self.name} {self.max_tokens} {self.heads}', weights)}"

    def networks(self) -> Sequence[nn.Module]:
        """See `TextEncoder.networks`."""
        return [self]

    def identities(self) -> tuple[None, None]:
        """See `TextEncoder.identities`: it learns, so that no features hold its text."""
        return None, None


class WordBlock(nn.Module):
    """Attention and feed-forward, each after a norm."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.attention_out = nn.Linear(channels, channels)
        self.feed_forward_norm = nn.LayerNorm(channels)
        self.feed_forward = FeedForward(channels, bias=True)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """`B L D`, real tokens `B L` or None -> `B L D`."""
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(2, (3, self.heads, -1)).unbind(2)
        x = x + self.attention_out(attention(q, k, v, mask).flatten(2))
        return x + self.feed_forward(self.feed_forward_norm(x))


def _spelled(prompt: str) -> list[list[int]]:
    """The rows of the table that make up each word, and at last the end."""
    # Half of a surrogate pair, which broken captions hold, has no UTF-8
    words = _WORD.findall(prompt.encode(errors="replace"))
    return [[_BYTES + 256 * place + byte for place, byte in enumerate(word)] for word in words] + [[_END]]


def _table_rows(spelled: Sequence[list[list[int]]], max_tokens: int) -> Tensor:
    """Spelled prompts -> `B L WORD_BYTES`; one that is too long keeps its first words and its end."""
    kept = [words if len(words) <= max_tokens else [*words[: max_tokens - 1], [_END]] for words in spelled]
    length = max(map(len, kept), default=1)
    filled = [
        [word + [_NONE] * (WORD_BYTES - len(word)) for word in words + [[]] * (length - len(words))] for words in kept
    ]
    return torch.tensor(filled, dtype=torch.long).reshape(len(kept), length, WORD_BYTES)
