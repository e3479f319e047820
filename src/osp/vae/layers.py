"""Causal layers shared by the whole VAE family.

Video is `B C T H W` throughout; a layer that works on single frames is one whose kernel spans one frame. Every layer
takes `(x, state)`, see `osp.vae.stream`. In memory the channels come last wherever a layer has the choice: norms and
1x1x1 convolutions are then row operations, and frames can be folded into the batch without a copy.
"""

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from osp.checks import check_choice
from osp.errors import UsageError
from osp.vae.convolution import convolve_frames, convolve_over_time, worth_sliding
from osp.vae.stream import StreamState

Norm = Literal["layer", "group"]
Interpolation = Literal["trilinear", "nearest"]


class CausalConv3d(nn.Conv3d):
    """A convolution that sees the past only: in time the first frame is repeated kt - 1 times in front.

    In space the padding is zero, half the kernel on each side; with a spatial stride of 2 it is one row and one column
    at the bottom and right.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: tuple[int, int, int], stride: tuple[int, int, int] = (1, 1, 1)
    ):
        self.strided = stride[1] > 1
        padding = (0, 0, 0) if self.strided else (0, kernel[1] // 2, kernel[2] // 2)
        super().__init__(inputs, outputs, kernel, stride, padding)
        self.growth = outputs / inputs / math.prod(stride)

    def forward(
        self, x: Tensor, state: StreamState | None = None, each: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """`B C T H W` -> `B D 1+(T-1)/st H/sh W/sw` with strides st, sh, sw.

        `each` is applied to the frames first, as late as possible: where frames go through one by one, its result never
        exists for all of them. It may not mix frames.
        """
        span, step = self.kernel_size[0], self.stride[0]
        if span == 1:
            return self._convolve_frames(x, each)
        past = state.take(self) if state is not None else None
        if step == 1 and x.shape[2] and worth_sliding(x):
            out, past = convolve_over_time(x, past, self.weight, self.bias, each)
            if state is not None:
                state.keep(self, *past)
            return out
        x = x if each is None else each(x)
        x = torch.cat([x[:, :, :1]] * (span - 1) + [x] if past is None else [*past, x], dim=2)
        outputs = max(0, (x.shape[2] - span) // step + 1)
        if state is not None:
            state.keep(self, *x[:, :, outputs * step :].split(1, dim=2))
        if outputs == 0:
            height, width = (x.shape[3] // self.stride[1], x.shape[4] // self.stride[2])
            return x.new_empty(x.shape[0], self.out_channels, 0, height, width)
        return super().forward(F.pad(x, (0, 1, 0, 1)) if self.strided else x)

    def _convolve_frames(self, x: Tensor, each: Callable[[Tensor], Tensor] | None) -> Tensor:
        weight = self.weight[:, :, 0]
        if not self.strided and x.shape[2] and worth_sliding(x):
            return convolve_frames(x, weight, self.bias, each)
        x = x if each is None else each(x)
        batch, _, frames, height, width = x.shape
        if frames == 0:
            height, width = height // self.stride[1], width // self.stride[2]
            return x.new_empty(batch, self.out_channels, 0, height, width)
        flat = x.transpose(1, 2).flatten(0, 1)
        flat = F.pad(flat, (0, 1, 0, 1)) if self.strided else flat
        out = F.conv2d(flat, weight, self.bias, self.stride[1:], self.padding[1:])
        return out.unflatten(0, (batch, frames)).transpose(1, 2)


class Downsample(CausalConv3d):
    """Halves height and width, and with `time` the frames after the first too."""

    def __init__(self, channels: int, *, time: bool) -> None:
        super().__init__(channels, channels, (3, 3, 3) if time else (1, 3, 3), (2, 2, 2) if time else (1, 2, 2))


class LayerNorm(nn.Module):
    """Layer norm over the channels of each position, eps 1e-6."""

    per_frame = True

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """`B C T H W` -> the same shape."""
        normed = F.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.bias, eps=1e-6)
        return normed.movedim(-1, 1)


class GroupNorm(nn.GroupNorm):
    """Group norm with 32 groups, eps 1e-6; its statistics span all frames, or with `per_frame` each frame alone."""

    def __init__(self, channels: int, *, per_frame: bool) -> None:
        if channels % 32:
            raise UsageError(f"group norm needs channels in multiples of 32, got {channels}; use norm=layer")
        super().__init__(32, channels, eps=1e-6)
        self.per_frame = per_frame

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """`B C T H W` -> the same shape. Raises UsageError in a stream, whose later frames it would need."""
        if self.per_frame:
            batch, _, frames = x.shape[:3]
            return super().forward(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, frames)).transpose(1, 2)
        if state is not None:
            raise UsageError("group norm over time needs the whole clip and cannot stream; use a VAE with norm=layer")
        return super().forward(x)


def norm_layer(kind: Norm, channels: int, *, per_frame: bool = False) -> nn.Module:
    """The norm by its name; `per_frame` says that the layers around it see single frames."""
    check_choice("norm", kind, get_args(Norm))
    return LayerNorm(channels) if kind == "layer" else GroupNorm(channels, per_frame=per_frame)


def activated(
    norm: nn.Module, convolution: CausalConv3d, x: Tensor, state: StreamState | None, dropout: nn.Module | None = None
) -> Tensor:
    """Norm, SiLU and convolution: `B C T H W` -> `B D T H W`."""

    def activate(frames: Tensor) -> Tensor:
        frames = F.silu(norm(frames, state), inplace=not torch.is_grad_enabled())
        return frames if dropout is None else dropout(frames)

    return convolution(x, state, each=activate) if norm.per_frame else convolution(activate(x), state)


class ResidualBlock(nn.Module):
    """Norm, SiLU, convolution, twice, and a shortcut; with `time` the convolutions see three frames, else one."""

    def __init__(self, inputs: int, outputs: int, *, norm: Norm, time: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        kernel = (3, 3, 3) if time else (1, 3, 3)
        self.norm1 = norm_layer(norm, inputs, per_frame=not time)
        self.conv1 = CausalConv3d(inputs, outputs, kernel)
        self.norm2 = norm_layer(norm, outputs, per_frame=not time)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = CausalConv3d(outputs, outputs, kernel)
        self.shortcut = CausalConv3d(inputs, outputs, (1, 1, 1)) if inputs != outputs else None

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """`B C T H W` -> `B D T H W`."""
        h = activated(self.norm1, self.conv1, x, state)
        h = activated(self.norm2, self.conv2, h, state, self.dropout)
        return add(h, x if self.shortcut is None else self.shortcut(x, state))


def add(fresh: Tensor, x: Tensor) -> Tensor:
    """The sum, in place of `fresh` (which nobody else may need) where no gradient is recorded."""
    return fresh + x if torch.is_grad_enabled() else fresh.add_(x)


class FrameAttention(nn.Module):
    """Self-attention among the positions of each frame, with one head as wide as the channels."""

    def __init__(self, channels: int, *, norm: Norm) -> None:
        super().__init__()
        self.norm = norm_layer(norm, channels)
        self.q, self.k, self.v, self.output = (CausalConv3d(channels, channels, (1, 1, 1)) for _ in range(4))

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """`B C T H W` -> the same shape."""
        if x.shape[2] == 0:
            return x
        normed = self.norm(x, state)
        # B C T H W -> (B T) 1 (H W) C
        q, k, v = (
            layer(normed, state).movedim(1, -1).flatten(0, 1).flatten(1, 2)[:, None]
            for layer in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return add(self.output(attended.reshape(*x.movedim(1, -1).shape).movedim(-1, 1), state), x)


class TimeUpsample(nn.Module):
    """Doubles the frames after the first one.

    By default they are interpolated linearly, without aligned corners: both frames that come of frame i need frame i
    and one neighbour each, so the layer looks one frame ahead and holds its last frame back until the stream's end.
    With "nearest" they are repeated.
    """

    def __init__(self, interpolation: Interpolation = "trilinear") -> None:
        super().__init__()
        check_choice("temporal_interpolation", interpolation, get_args(Interpolation))
        self.interpolation = interpolation
        self.growth = 2

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """`B C T H W` -> `B C 1+2(T-1) H W`."""
        held = state.take(self) if state is not None else None
        if held is None:
            first, x = x[:, :, :1], x[:, :, 1:]
            past = x[:, :, :1]  # the edge: the first interpolated frame is its own left neighbour
        else:
            first, past = x[:, :, :0], held[0]
        if self.interpolation == "nearest":
            if state is not None:
                state.keep(self, x[:, :, :0])
            return torch.cat([first, x.repeat_interleave(2, dim=2)], dim=2)
        if held is not None and past.shape[2] == 0:
            past = x[:, :, :1]  # until now the stream had its first frame only
        frames = torch.cat([past, x], dim=2)
        if state is None or state.last:
            frames = torch.cat([frames, frames[:, :, -1:]], dim=2)
        if state is not None:
            state.keep(self, frames[:, :, -2:])
        rows = _wide(frames).movedim(1, -1)
        left, middle, right = rows[:, :-2], rows[:, 1:-1], rows[:, 2:]
        doubled = torch.stack([0.25 * left + 0.75 * middle, 0.75 * middle + 0.25 * right], dim=2).flatten(1, 2)
        return torch.cat([first, doubled.to(x.dtype).movedim(-1, 1)], dim=2)


class Upsample(nn.Module):
    """Doubles height and width, and with `time` the frames after the first too (see `TimeUpsample`), then convolves.

    In space the frames with `time` are interpolated bilinearly, those without repeated.
    """

    def __init__(self, channels: int, *, time: bool, interpolation: Interpolation = "trilinear") -> None:
        super().__init__()
        self.time = TimeUpsample(interpolation) if time else None
        self.growth = 8 if time else 4
        self.conv = CausalConv3d(channels, channels, (3, 3, 3) if time else (1, 3, 3))

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """`B C T H W` -> `B C 1+2(T-1) 2H 2W` with `time`, else `B C T 2H 2W`."""
        # The published models go back to half precision only after both interpolations.
        wide = x if self.time is None else self.time(_wide(x), state)
        mode = "nearest" if self.time is None else "bilinear"
        return self.conv(wide, state, each=lambda frames: _double_space(frames, mode).to(x.dtype))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _double_space(x: Tensor, mode: str) -> Tensor:
    batch, channels, frames, height, width = x.shape
    if frames == 0:
        return x.new_empty(batch, channels, 0, 2 * height, 2 * width)
    corners = False if mode == "bilinear" else None
    doubled = F.interpolate(x.transpose(1, 2).flatten(0, 1), scale_factor=2, mode=mode, align_corners=corners)
    return doubled.unflatten(0, (batch, frames)).transpose(1, 2)
