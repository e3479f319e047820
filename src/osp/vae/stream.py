"""The frames that a stream keeps between two chunks.

A layer takes `(x, state)`. With `state=None` the chunk is the whole clip. With a `StreamState` it is the next piece of
a longer clip, and the layer finds in the state just the frames that it still needs. Layers keep nothing on themselves,
so several streams can run through one model at once.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Layer = Callable[[Tensor, "StreamState | None"], Tensor]

_PIECE_BYTES = 32 << 20


class StreamState:
    """The frames each layer of one stream still needs, by layer.

    Set `last` before the chunk that ends the clip (it may have zero frames): layers that look ahead then flush what
    they hold back. `first` says that the chunk begins the clip, and changes how it is cut up, not what comes out.
    """

    def __init__(self) -> None:
        self.first = True
        self.last = False
        self._kept: dict[nn.Module, tuple[Tensor, ...]] = {}

    def take(self, layer: nn.Module) -> tuple[Tensor, ...] | None:
        """The frames that `layer` kept at the chunk before, or None at its first chunk."""
        return self._kept.get(layer)

    def keep(self, layer: nn.Module, *frames: Tensor) -> None:
        """Keep copies: a view would hold the whole chunk in memory.

        They go where the ones before lay: long-lived blocks between ever new ones would break up the allocator's heap.
        """
        before = self._kept.get(layer)
        same = before is not None and [part.shape for part in before] == [part.shape for part in frames]
        if before is None or not same or torch.is_grad_enabled():
            self._kept[layer] = tuple(part.clone() for part in frames)
            return
        for old, new in zip(before, frames, strict=True):
            old.copy_(new)


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
    """Layers one after another, see `run`."""

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """`B C T H W` -> what the last layer gives."""
        return run(tuple(self), x, state)


def run(layers: Sequence[Layer], x: Tensor, state: StreamState | None) -> Tensor:
    """Layers one after another, each given the stream's state: `B C T H W` -> what the last one gives.

    Where a stream's chunk is large, or is about to become so (a layer's `growth` is the size of its output to that of
    its input), the remaining layers take it in shorter pieces: they need not see it at once, and the memory stays that
    of the pieces.
    """
    for i, layer in enumerate(layers):
        frame_bytes = x[:, :, :1].numel() * x.element_size() * max(1.0, getattr(layer, "growth", 1.0))
        # An even number, after the first frame: see `osp.vae.convolution`.
        frames = max(2, int(_PIECE_BYTES / max(1.0, frame_bytes)) // 2 * 2)
        if state is not None and x.shape[2] > frames + 1:
            return _run_in_pieces(layers[i:], x, state, frames)
        x = layer(x, state)
    return x


def _run_in_pieces(layers: Sequence[Layer], x: Tensor, state: StreamState, frames: int) -> Tensor:
    first, last = state.first, state.last
    done, parts = 0, []
    while done < x.shape[2]:
        length = frames + (first and done == 0)
        state.first, state.last = first and done == 0, last and done + length >= x.shape[2]
        parts.append(run(layers, x[:, :, done : done + length], state))
        done += length
    state.first, state.last = first, last
    return torch.cat(parts, dim=2)
