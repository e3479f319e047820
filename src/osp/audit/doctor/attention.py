"""Attention as the models use it: every head dim, with padding and without, few and many keys, many rows."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from osp.audit.doctor.kernels import Kernel, check_kernels, drawn
from osp.audit.doctor.result import Result
from osp.audit.doctor.subject import Subject
from osp.devices import attention

_NAMES = ("queries", "keys", "values")
_MANY = 70_000  # rows; kernels that put them on one axis of a grid fail beyond 65,535
_FUSED = (
    "the fused kernel of this torch on this device is wrong: update torch and the driver (on Ascend torch-npu and "
    "CANN), and report it; do not train with it"
)
_MASKED = (
    "masks come out wrong here, as fused kernels are known to do beyond 512 keys or with boolean masks: update torch "
    "and the driver (on Ascend torch-npu and CANN), and report it; do not train with it"
)


def check_attention(subject: Subject) -> Iterator[Result]:
    """Lines for attention without padding, with padding, and within the frames of a VAE."""
    for device in subject.devices:
        yield check_kernels("attention.plain", plain(subject.head_dims, device), device, _FUSED)
        yield check_kernels("attention.padded", padded(subject.head_dims, device), device, _MASKED)
        yield check_kernels("attention.frame", frames(subject.vae_channels), device, _FUSED)


def plain(head_dims: Sequence[int], device: torch.device) -> Iterator[Kernel]:
    """Self-attention and attention to a text, at each head dim, and of many short rows."""
    for dim in head_dims:
        yield _kernel(2, 130, 130, 2, dim)
        yield _kernel(2, 65, 77, 2, dim)
    yield _kernel(*_many(device), 1, min(head_dims))


def padded(head_dims: Sequence[int], device: torch.device) -> Iterator[Kernel]:
    """The same with keys that take no part; beyond 512 keys too, in the first block, in the last, and in between."""
    for dim in head_dims:
        yield _kernel(3, 65, 77, 2, dim, real=_real(3, 77))
        yield _kernel(2, 40, 700, 1, dim, real=_real(2, 700))
    yield _kernel(*(many := _many(device)), 1, min(head_dims), real=_real(many[0], many[2]))


def frames(channels: Sequence[int]) -> Iterator[Kernel]:
    """One head as wide as the channels of a VAE's middle, without padding."""
    for width in sorted({4 * count for count in channels}):
        yield Kernel(
            f"one head of {width} channels",
            F.scaled_dot_product_attention,
            lambda q, k, v: formula(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2),
            [drawn(2, 1, 48, width, seed=seed) for seed in range(3)],
            _NAMES,
        )


def formula(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v over the real keys, `B N H D`, with plain operations."""
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(q.shape[-1])
    if real is not None:
        scores = scores.masked_fill(~real[:, None, None, :], -torch.inf)
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)


def _kernel(rows: int, queries: int, keys: int, heads: int, dim: int, real: Tensor | None = None) -> Kernel:
    q, k, v = (drawn(rows, length, heads, dim, seed=seed) for seed, length in enumerate((queries, keys, keys)))
    if real is not None:
        v = torch.where(real[:, :, None, None], v, 20 * v)  # so that one masked key too many shows
    padding = "" if real is None else ", padded"
    about = f"{rows} rows of {queries} queries and {keys} keys{padding}, head dim {dim}"
    return Kernel(about, attention, formula, (q, k, v, real), _NAMES)


def _many(device: torch.device) -> tuple[int, int, int]:
    """Rows, queries and keys of many short rows; the CPU has no grid to overflow."""
    return (_MANY if device.type != "cpu" else 600, 2, 3)


def _real(rows: int, keys: int) -> Tensor:
    """Which keys are real: the first row lacks the last ones, the second the first ones, others some here and there."""
    real = torch.rand(rows, keys, generator=torch.Generator().manual_seed(7)) < 0.6
    real[0], real[1] = torch.arange(keys) < 0.9 * keys, torch.arange(keys) > 0.3 * keys
    real[:, keys // 2] = True  # a row without any is a case of its own
    return real
