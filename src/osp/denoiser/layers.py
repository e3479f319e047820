"""The layers that the transformers are made of."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORM_EPS = 1e-6  # of every norm in every published denoiser


def sinusoid(time: Tensor, channels: int) -> Tensor:
    """`B` -> `B C`: cosines, then sines, of frequencies from 1 down to 1/10000; float32."""
    half = channels // 2
    steps = torch.arange(half, device=time.device, dtype=torch.float32)
    angles = time.float()[:, None] * torch.exp(-math.log(10000) / half * steps)
    return torch.cat((angles.cos(), angles.sin()), dim=1)


def sines(positions: Tensor, channels: int) -> Tensor:
    """`N` -> `N C`: sines, then cosines, of frequencies from 1 down towards 1/10000, in the positions' type."""
    steps = torch.arange(0, channels, 2, device=positions.device, dtype=positions.dtype) / channels
    angles = positions[:, None] * 10000.0**-steps
    return torch.cat((angles.sin(), angles.cos()), dim=1)


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """`B N D` -> norm(x) * scale + shift, with scale and shift `B D`."""
    size = x.shape[-1:]
    if len(x) == 1:  # one pass over memory
        return F.layer_norm(x, size, scale[0], shift[0], NORM_EPS)
    return torch.addcmul(shift[:, None], F.layer_norm(x, size, eps=NORM_EPS), scale[:, None])


def initialise(module: nn.Module, *zeros: str) -> None:
    """Start all linear layers below: normal values that keep the variance of what goes through; biases 0.

    Those called one of `zeros` start at 0.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            own_name = name.rpartition(".")[2]
            nn.init.normal_(layer.weight, std=0.0 if own_name in zeros else layer.in_features**-0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class MLP(nn.Module):
    """`... D` -> `... D_out` by way of `hidden` channels and one activation."""

    def __init__(self, channels: int, hidden: int, out: int, activation: nn.Module, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(channels, hidden, bias=bias)
        self.activation = activation
        self.down = nn.Linear(hidden, out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """`... D` -> `... D_out`."""
        return self.down(self.activation(self.up(x)))


class FeedForward(MLP):
    """Four times as wide inside, with the tanh approximation of GELU."""

    def __init__(self, channels: int, bias: bool) -> None:
        super().__init__(channels, 4 * channels, channels, nn.GELU(approximate="tanh"), bias)


class PatchEmbedding(nn.Module):
    """`B C T H W` -> tokens `B N D`, one for each patch of `patch_size` x `patch_size` in a frame."""

    def __init__(self, channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.linear = nn.Linear(channels * patch_size**2, width)

    def forward(self, latent: Tensor) -> Tensor:
        """A patch's values, channels first, through one linear layer: `B C T H W` -> `B N D`."""
        x = latent.unflatten(4, (-1, self.patch_size)).unflatten(3, (-1, self.patch_size))  # B C T h p w q
        return self.linear(x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3))
