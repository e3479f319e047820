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

_BLOCK = re.compile(r"blocks\.(\d+)\.")
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


def denoiser_flops(model: Denoiser, latent: Sequence[int], text: int, batch: int = 1, images: int = 0) -> DenoiserFlops:
    """The operations for so many latents of frames, height and width, each with so many tokens of text.

    In a joint batch the last so many frames of a latent are `images`, and each of these has as much text again. The
    operations do not depend on masks, which leave out what does not count but not, in general, its computation. The
    model may be on the meta device. Raises UsageError for a latent or a text that the model does not take, and for a
    layer that its family does not name.
    """
    grid = _grid(model, latent, text, batch, images)
    grids, described = model.block_grids(grid, images), model.linear_layers
    tokens = {"video": grid.tokens, "text": text * (1 + images), "once": 1}
    embedding = linear = 0
    for name, weights in linear_layers(model).items():
        own = _own_grid(name, grids, grid)
        if own is not None:
            seen = described.rows[_NUMBER.sub("*", name)]
            products = weights * (own.tokens if seen == "video" else tokens[seen])
            is_input = _NUMBER.sub("*", name) in described.inputs
            embedding, linear = embedding + is_input * products, linear + (not is_input) * products
    heads_width: int = model.config.width
    joint = text if described.joint_text else 0
    pairs = {each: _pairs(*each, joint) for each in set(zip(model.schedule, grids, strict=True))}
    # The products are queries times keys, and probabilities times values, in all heads.
    attention = 2 * heads_width * sum(pairs[each] for each in zip(model.schedule, grids, strict=True))
    readers = [] if described.joint_text else grids[:: described.text_every]
    text_attention = 2 * heads_width * text * sum(own.tokens for own in readers if own is not None)
    return DenoiserFlops(*(2 * batch * part for part in (embedding, linear, attention, text_attention)))


def _grid(model: Denoiser, latent: Sequence[int], text: int, batch: int, images: int) -> Grid:
    """The grid of tokens, as the model checks and counts it."""
    joint = {"images": images} if images else {}
    texts = (1 + images,) if images else ()
    model.block_grids(Grid(1 + images, 1, 1), images)  # refuses images for families that take none
    with torch.device("meta"):
        pooled = None if model.pooled_channels is None else torch.empty(batch, model.pooled_channels)
        video = torch.empty(batch, model.latent_channels, *latent)
        words = torch.empty(batch, *texts, text, model.text_channels)
        return model.check(video, torch.empty(batch), words, None, pooled, None, **joint)


def _own_grid(name: str, grids: Sequence[Grid | None], grid: Grid) -> Grid | None:
    """The tokens that a layer sees: those of its block, or all."""
    inside = _BLOCK.match(name)
    return grids[int(inside[1])] if inside else grid


def linear_layers(model: Denoiser) -> dict[str, int]:
    """How many weights each linear layer has, by its name.

    Raises UsageError for a family without `LinearLayers`, and for a layer that is not in them: it would be counted
    wrong.
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
            weights[name] = layer.weight.numel()
        elif isinstance(layer, _UNCOUNTED):
            raise UsageError(f"{family}: the operations of {name}, a {type(layer).__name__}, cannot be counted")
    return weights


def _pairs(pattern: Pattern, grid: Grid | None, text: int) -> int:
    """Pairs of a query and a key, over all groups; none where a block is passed by.

    The filling of groups is not in it, as the model cuts it off (`Pattern.runs`), but for what lies between real tokens
    in a group. Joint attention appends all of the text to each group, so that k groups see it k times.
    """
    if grid is None:
        return 0
    return sum((run.stop - run.start) * (run.length + text) ** 2 for run in pattern.runs(grid))
