"""Convolutions that slide over a clip frame by frame, for inference on the CPU.

A 3x3x3 convolution at stride 1 costs two thirds of its multiplications here: two output frames share four 2D
convolutions instead of six (Winograd's F(2, 3) in time; Lavin and Gray, arXiv:1509.09308). Its coefficients are 1 and
1/2, and its rounding error was measured to be that of the direct convolution in the same memory layout. The first
frame of a clip, which is its own past, takes one 2D convolution instead of three.

Going frame by frame also keeps every temporary small: of a size that the allocator hands out again instead of asking
the system for fresh pages, which costs as much as a fifth of a decoder's time.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Each = Callable[[Tensor], Tensor]

SMALL_FRAME = 1 << 15
"""Frames of fewer values than this go through at once: there the calls cost more than the arithmetic."""


def worth_sliding(x: Tensor) -> bool:
    """Whether a clip `B C T H W` should slide. Training keeps the plain convolution, whose backward pass is one too.

    Half precision does too: the sums of frames would lose bits there.
    """
    exact = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
    large = x[:, :, :1].numel() >= SMALL_FRAME
    free = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return exact and large and free and x.device.type == "cpu"


def convolve_frames(x: Tensor, weight: Tensor, bias: Tensor | None, each: Each | None) -> Tensor:
    """A 2D convolution of each frame: `B C T H W`, weight `D C kh kw` with odd kernel -> `B D T H W`."""
    kernel = weight.contiguous(memory_format=torch.channels_last)
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    out = None
    for i in range(x.shape[2]):
        frame = F.conv2d(_frame(x, i, each), kernel, bias, padding=padding)
        out = _room(frame, x.shape[2], len(weight)) if out is None else out
        out[:, :, i] = frame
    assert out is not None
    return out


def convolve_over_time(
    x: Tensor, past: tuple[Tensor, ...] | None, weight: Tensor, bias: Tensor | None, each: Each | None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A causal 3x3x3 convolution: `B C T H W` -> `B D T H W`, and the last two frames for the next piece of a stream.

    `past` holds the two of the piece before, `B C 1 H W` each; None means that x begins the clip, whose first frame is
    then its own past.
    """
    g0, g2 = (weight[:, :, i].contiguous(memory_format=torch.channels_last) for i in (0, 2))
    plus = (g0 + g2).mul_(0.5)
    minus = torch.sub(plus, weight[:, :, 1], alpha=0.5)
    plus.add_(weight[:, :, 1], alpha=0.5)
    count, done = x.shape[2], 0 if past is not None else 1
    first = _frame(x, 0, each)
    f0, f1 = (first, first) if past is None else (frame[:, :, 0] for frame in past)
    out = _room(first, count, len(weight))
    if past is None:
        out[:, :, 0] = F.conv2d(first, plus * 2, bias, padding=1)
    while done + 2 <= count:
        f2 = first if done == 0 else _frame(x, done, each)
        f3 = _frame(x, done + 1, each)
        even, odd = out[:, :, done], out[:, :, done + 1]
        even.copy_(F.conv2d(f1 + f2, plus, bias, padding=1))
        difference = F.conv2d(f2 - f1, minus, padding=1)
        torch.sub(even, difference, out=odd)
        even += difference
        del difference
        even += F.conv2d(f0 - f2, g0, padding=1)
        odd -= F.conv2d(f1 - f3, g2, padding=1)
        f0, f1, done = f2, f3, done + 2
    if done < count:
        f2 = first if done == 0 else _frame(x, done, each)
        last = out[:, :, done]
        last.copy_(F.conv2d(f0, g0, bias, padding=1))
        last += F.conv2d(f1, weight[:, :, 1], padding=1)
        last += F.conv2d(f2, g2, padding=1)
        f0, f1 = f1, f2
    return out, (f0[:, :, None], f1[:, :, None])


def _frame(x: Tensor, index: int, each: Each | None) -> Tensor:
    frame = x[:, :, index : index + 1]
    return (frame if each is None else each(frame))[:, :, 0]


def _room(frame: Tensor, frames: int, channels: int) -> Tensor:
    """An empty `B D T H W`, with the channels last in memory, for frames `B C H W`."""
    batch, _, height, width = frame.shape
    return frame.new_empty(batch, frames, height, width, channels).movedim(-1, 1)
