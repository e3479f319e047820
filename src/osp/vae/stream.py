"""What a stream keeps between two chunks.

A layer takes `(x, state)`. With `state=None` the chunk is the whole clip. With a `StreamState` it is the next piece of
a longer clip, and the layer finds in the state just the frames that it still needs. Layers keep nothing on themselves,
so several streams can run through one model at once.
"""

import torch
from torch import Tensor, nn


class StreamState:
    """The frames each layer of one stream still needs, by layer.

    Set `last` before the chunk that ends the clip (it may have zero frames): layers that look ahead then flush what
    they hold back.
    """

    def __init__(self) -> None:
        self.last = False
        self._kept: dict[nn.Module, tuple[Tensor, ...]] = {}

    def take(self, layer: nn.Module) -> tuple[Tensor, ...] | None:
        """What `layer` kept at the chunk before, or None at its first chunk."""
        return self._kept.get(layer)

    def keep(self, layer: nn.Module, *frames: Tensor) -> None:
        """Keep copies: a view would hold the whole chunk in memory."""
        self._kept[layer] = tuple(part.clone() for part in frames)


class Join(nn.Module):
    """Where two branches meet: passes on the frames that both have delivered and holds the others back."""

    def forward(self, a: Tensor, b: Tensor, state: StreamState | None = None) -> tuple[Tensor, Tensor]:
        """`B C T H W` and `B D U H W` -> both with the min(T, U) frames they share; for a whole clip T = U."""
        if state is None:
            return a, b
        if held := state.take(self):
            a, b = torch.cat([held[0], a], dim=2), torch.cat([held[1], b], dim=2)
        ready = min(a.shape[2], b.shape[2])
        state.keep(self, a[:, :, ready:], b[:, :, ready:])
        return a[:, :, :ready], b[:, :, :ready]


class Chain(nn.Sequential):
    """Layers one after another, each given the stream's state."""

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """`B C T H W` -> what the last layer gives."""
        for layer in self:
            x = layer(x, state)
        return x
