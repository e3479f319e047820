"""What a denoiser computes, counted from its layers and the groups of its patterns: nothing is run."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from osp.denoiser.cross import CrossTransformer
from osp.denoiser.denoiser import Denoiser
from osp.denoiser.grid import Grid
from osp.denoiser.patterns import Pattern

# Linear layers by a part of their name: those that see a sample once, and those that see its text. All others see the
# video's tokens.
_ONCE = {"time", "pooled_text", "modulation", "out_modulation", "attention_modulation", "feed_forward_modulation"}
_TEXT = {"text", "text_kv", "text_skips"}
# Those that are the first to see an input
_EMBEDDINGS = re.compile(r"(time|pooled_text|text)\.up|text|(patch|condition_patches\.\d+)\.linear")


@dataclass(frozen=True)
class DenoiserFlops:
    """Operations of one forward pass, a multiply-add being two.

    Norms, softmax and what goes element by element are left out, as torch's own counter does. `embedding` are the
    linear layers that read what comes from outside, `linear` all others, `attention` is that of the patterns, with the
    text where attention is joint, and `text_attention` that of the video to the text where it is not.
    """

    embedding: int
    linear: int
    attention: int
    text_attention: int

    @property
    def forward(self) -> int:
        """All of the forward pass."""
        return self.embedding + self.linear + self.attention + self.text_attention

    @property
    def backward(self) -> int:
        """The backward pass, without what `recompute_every` computes again."""
        # A linear layer takes two products as large as its own, for the gradients of its weights and of its input;
        # those that read latent, text or time need none of the latter.
        linear = self.embedding + 2 * self.linear
        # A fused attention, which keeps no matrix of queries by keys, takes five products for its two: the scores
        # again, and the gradients of the probabilities, the values, the queries and the keys.
        return linear + 5 * (self.attention + self.text_attention) // 2

    @property
    def attention_share(self) -> float:
        """How much of the forward pass is the patterns' attention, from 0 to 1."""
        return self.attention / self.forward


def denoiser_flops(model: Denoiser, latent: Sequence[int], text: int, batch: int = 1) -> DenoiserFlops:
    """The operations for so many latents of frames, height and width, each with so many tokens of text.

    They do not depend on masks, which leave out what does not count but not, in general, its computation. The model may
    be on the meta device. Raises UsageError for a latent or a text that the model does not take.
    """
    grid = _grid(model, latent, text, batch)
    joint = not isinstance(model, CrossTransformer)
    heads_width: int = model.config.width
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    products = {name: _rows(name, grid, text) * layer.weight.numel() for name, layer in layers.items()}
    embedding = sum(count for name, count in products.items() if _EMBEDDINGS.fullmatch(name))
    pairs = {pattern: _pairs(pattern, grid, text if joint else 0) for pattern in dict.fromkeys(model.schedule)}
    # Queries times keys, and probabilities times values, in all heads.
    attention = 2 * heads_width * sum(pairs[pattern] for pattern in model.schedule)
    text_attention = 0 if joint else 2 * heads_width * len(model.schedule) * grid.tokens * text
    parts = embedding, sum(products.values()) - embedding, attention, text_attention
    return DenoiserFlops(*(2 * batch * part for part in parts))


def _grid(model: Denoiser, latent: Sequence[int], text: int, batch: int) -> Grid:
    """As the model checks and counts it."""
    with torch.device("meta"):
        pooled = None if model.pooled_channels is None else torch.empty(batch, model.pooled_channels)
        video = torch.empty(batch, model.latent_channels, *latent)
        return model.check(video, torch.empty(batch), torch.empty(batch, text, model.text_channels), None, pooled, None)


def _rows(name: str, grid: Grid, text: int) -> int:
    """How many rows a linear layer sees of a sample."""
    parts = set(name.split("."))
    return 1 if parts & _ONCE else text if parts & _TEXT else grid.tokens


def _pairs(pattern: Pattern, grid: Grid, text: int) -> int:
    """Pairs of a query and a key, over all groups.

    The filling of groups is not in it, as the model cuts it off (`Pattern.runs`), but for what lies between real tokens
    in a group. Joint attention appends all of the text to each group, so that k groups see it k times.
    """
    return sum((run.stop - run.start) * (run.length + text) ** 2 for run in pattern.runs(grid))
