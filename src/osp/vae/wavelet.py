"""The Haar wavelet over space (2D) and over time and space (3D), and its inverse.

A level is one convolution with kernel and stride 2, its inverse the transposed convolution with the same filters.
Sub-bands are ordered over (t, h, w) as LLL LLH LHL LHH HLL HLH HHL HHH in 3D and over (h, w) as LL HL LH HH in 2D;
channel = band * C + colour (WF-VAE, arXiv:2411.17459, section 3.1).
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from osp.vae.stream import StreamState

PUBLISHED_SCALE_3D = 0.3536
"""The published weights hold 1/sqrt(8) rounded to four digits; with the exact value their output is off by 1e-4."""

EXACT_SCALE_3D = 1 / math.sqrt(8)
SCALE_2D = 0.5


def haar_filters_3d(scale: float = EXACT_SCALE_3D) -> Tensor:
    """The eight 3D filters, `8 2 2 2` (band, t, h, w), of values +-scale."""
    low, high = torch.tensor([1.0, 1.0]), torch.tensor([1.0, -1.0])
    bands = [torch.einsum("t,h,w->thw", a, b, c) for a in (low, high) for b in (low, high) for c in (low, high)]
    return torch.stack(bands) * scale


def haar_filters_2d(scale: float = SCALE_2D) -> Tensor:
    """The four 2D filters, `4 1 2 2` (band, one frame, h, w), of values +-scale."""
    low, high = torch.tensor([1.0, 1.0]), torch.tensor([1.0, -1.0])
    bands = [torch.einsum("h,w->hw", b, c) for c in (low, high) for b in (low, high)]
    return torch.stack(bands)[:, None] * scale


def _kernel(filters: Tensor, colours: int, like: Tensor) -> Tensor:
    """The filters for every colour: `(band colour) colour t h w`, zero where the colours differ."""
    eye = torch.eye(colours, device=like.device, dtype=like.dtype)
    kernel = torch.einsum("bthw,cd->bcdthw", filters.to(like), eye)
    return kernel.flatten(0, 1)


class HaarTransform(nn.Module):
    """One level of wavelet analysis.

    The filters are part of the state dict, because the published checkpoints carry them: `bands kt 2 2` with kt = 2 for
    3D and 1 for 2D. In 3D the first frame is repeated once in front, so that 1 + 2n frames give 1 + n coefficients.
    """

    filters: Tensor

    def __init__(self, filters: Tensor) -> None:
        super().__init__()
        if filters.shape[1] == 2:
            # A parameter that is never trained: the published parameter counts include the 3D analysis filters, and
            # neither the 2D ones nor those of the synthesis.
            self.filters = nn.Parameter(filters.clone(), requires_grad=False)
        else:
            self.register_buffer("filters", filters.clone())

    def forward(self, x: Tensor, state: StreamState | None = None) -> Tensor:
        """`B C T H W` -> `B (bands C) 1+(T-1)/2 H/2 W/2` (3D) or `B (bands C) T H/2 W/2` (2D)."""
        span = self.filters.shape[1]
        if span == 2:
            held = state.take(self) if state is not None else None
            front = x[:, :, :1] if held is None else held[0]
            x = torch.cat([front, x], dim=2)
            if state is not None:
                used = x.shape[2] // 2 * 2
                state.keep(self, x[:, :, used:])
                x = x[:, :, :used]
        bands = self.filters.shape[0]
        if x.shape[2] < span:
            return x.new_empty(x.shape[0], bands * x.shape[1], 0, x.shape[3] // 2, x.shape[4] // 2)
        return F.conv3d(x, _kernel(self.filters, x.shape[1], x), stride=(span, 2, 2))


class InverseHaarTransform(nn.Module):
    """One level of wavelet synthesis, the inverse of `HaarTransform`; in 3D it drops its first output frame."""

    filters: Tensor

    def __init__(self, filters: Tensor) -> None:
        super().__init__()
        self.register_buffer("filters", filters.clone())

    def forward(self, coefficients: Tensor, state: StreamState | None = None) -> Tensor:
        """`B (bands C) T H W` -> `B C 1+2(T-1) 2H 2W` (3D) or `B C T 2H 2W` (2D)."""
        bands, span = self.filters.shape[:2]
        batch, channels, frames, height, width = coefficients.shape
        colours = channels // bands
        if frames == 0:
            return coefficients.new_empty(batch, colours, 0, 2 * height, 2 * width)
        kernel = _kernel(self.filters, colours, coefficients)
        video = F.conv_transpose3d(coefficients, kernel, stride=(span, 2, 2))
        if span == 2:
            if state is None or state.take(self) is None:
                video = video[:, :, 1:]
            if state is not None:
                state.keep(self)
        return video


def haar3d(x: Tensor, scale: float = EXACT_SCALE_3D) -> Tensor:
    """One 3D level: `B C T H W` with T odd, H and W even -> `B 8C (T+1)/2 H/2 W/2`."""
    return HaarTransform(haar_filters_3d(scale)).to(x)(x)


def inverse_haar3d(coefficients: Tensor, scale: float = EXACT_SCALE_3D) -> Tensor:
    """The inverse of `haar3d`: `B 8C T H W` -> `B C 2T-1 2H 2W`."""
    return InverseHaarTransform(haar_filters_3d(scale)).to(coefficients)(coefficients)


def haar2d(x: Tensor, scale: float = SCALE_2D) -> Tensor:
    """One 2D level for each frame: `B C T H W` with H and W even -> `B 4C T H/2 W/2`."""
    return HaarTransform(haar_filters_2d(scale)).to(x)(x)


def inverse_haar2d(coefficients: Tensor, scale: float = SCALE_2D) -> Tensor:
    """The inverse of `haar2d`: `B 4C T H W` -> `B C T 2H 2W`."""
    return InverseHaarTransform(haar_filters_2d(scale)).to(coefficients)(coefficients)
