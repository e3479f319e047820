"""The operations of a denoiser, counted from its layers and the groups of its patterns; nothing is run."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from osp.denoiser.denoiser import Denoiser
from osp.denoiser.grid import Grid
from osp.denoiser.patterns import Pattern
from osp.errors import UsageError

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
# Layers that torch's counter counts, but that `LinearLayers` cannot describe.
_UNCOUNTED = (nn.modules.conv._ConvNd, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase)


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
        """Operations of the forward pass, all parts together."""
        return self.embedding + self.linear + self.attention + self.text_attention

    @property
    def backward(self) -> int:
        """Operations of the backward pass, without what `recompute_every` computes again."""
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
    be on the meta device. Raises UsageError for a latent or a text that the model does not take, and for a layer that
    its family does not name.
    """
    grid = _grid(model, latent, text, batch)
    layers, joint = linear_layers(model), model.linear_layers.joint_text
    heads_width: int = model.config.width
    rows = {"video": grid.tokens, "text": text, "once": 1}
    products = {name: rows[model.linear_layers.rows[name]] * weights for name, weights in layers.items()}
    embedding = sum(products.get(name, 0) for name in model.linear_layers.inputs)
    pairs = {pattern: _pairs(pattern, grid, text if joint else 0) for pattern in dict.fromkeys(model.schedule)}
    # The products are queries times keys, and probabilities times values, in all heads.
    attention = 2 * heads_width * sum(pairs[pattern] for pattern in model.schedule)
    text_attention = 0 if joint else 2 * heads_width * len(model.schedule) * grid.tokens * text
    parts = embedding, sum(products.values()) - embedding, attention, text_attention
    return DenoiserFlops(*(2 * batch * part for part in parts))


def _grid(model: Denoiser, latent: Sequence[int], text: int, batch: int) -> Grid:
    """The grid of tokens, as the model checks and counts it."""
    with torch.device("meta"):
        pooled = None if model.pooled_channels is None else torch.empty(batch, model.pooled_channels)
        video = torch.empty(batch, model.latent_channels, *latent)
        return model.check(video, torch.empty(batch), torch.empty(batch, text, model.text_channels), None, pooled, None)


def linear_layers(model: Denoiser) -> dict[str, int]:
    """How many weights the linear layers have, by their names in the family's `LinearLayers`; all blocks' together.

    Raises UsageError for a family without these, and for a layer that is not in them: it would be counted wrong.
    """
    family = type(model).__name__
    if not hasattr(model, "linear_layers"):
        raise UsageError(f"{family}: its operations cannot be counted, as it has no linear_layers; declare them there")
    weights: dict[str, int] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            pattern = _NUMBER.sub("*", name)
            if pattern not in model.linear_layers.rows:
                raise UsageError(f"{family}: its linear_layers do not say which rows {name} sees; add {pattern!r}")
            weights[pattern] = weights.get(pattern, 0) + layer.weight.numel()
        elif isinstance(layer, _UNCOUNTED):
            raise UsageError(f"{family}: the operations of {name}, a {type(layer).__name__}, cannot be counted")
    return weights


def _pairs(pattern: Pattern, grid: Grid, text: int) -> int:
    """Pairs of a query and a key, over all groups.

    The filling of groups is not in it, as the model cuts it off (`Pattern.runs`), but for what lies between real tokens
    in a group. Joint attention appends all of the text to each group, so that k groups see it k times.
    """
    return sum((run.stop - run.start) * (run.length + text) ** 2 for run in pattern.runs(grid))
