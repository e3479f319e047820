"""Attention: one function for every model, on every device."""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from osp.devices.kernels import are_fused
from osp.errors import UsageError

BLOCK = 128  # FlexAttention's own default: its kernels' tiles divide it
SHORT = 256  # keys up to which the CPU trains faster with the matrix in half precision than without it
GRID = 65_535  # of the smaller axes of CUDA's grid
VARIANTS = 64  # of one compiled function; torch's own limit is 8
HALF = (torch.float16, torch.bfloat16)
CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
HAS_TRITON = find_spec("triton") is not None  # what FlexAttention's kernels are written in

Backend = Callable[..., Tensor]  # of q, k, v and the real keys or None


def attention(q: Tensor, k: Tensor, v: Tensor, key_padding: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v for q `B N H D` and k, v `B M H D` -> `B N H D`.

    The inputs may be views with any strides, such as slices of a fused projection `B N 3 H D`; they are not copied.
    `key_padding` `B M` is True where a key is real; the others take no part. A sample that has no real key at all
    attends to all its keys. Without keys (M = 0) the result is zero. No mask or matrix of N x M is ever made where the
    device has a fused kernel: the CPU and CUDA have. (An exception is training in half precision on the CPU with few
    keys, where the kernel's backward pass is far slower than those of three plain operations.)

    On CUDA with padding FlexAttention skips the blocks of 128 keys without a real one, for any N and M; it wants half
    precision and head dims of 16 to 256 (those that are not powers of two cost as much as the next one that is), else
    the mask, broadcast over the queries, goes to the memory-efficient kernel. On NPUs it is torch's own kernel, or
    Ascend's where `choose_kernels` has said so. Inside `torch.compile` there is no break
    in the graph.

    Raises UsageError for shapes that do not fit together, and for a mask that is not `B M` of bool.
    """
    _check(q, k, v, key_padding)
    if q.shape[1] == 0 or k.shape[1] == 0:
        return _sdpa(q, k, v, None)  # which gives zeros without keys; FlexAttention refuses them
    if key_padding is not None:
        # A sample of padding only would divide zero by zero: it sees everything instead, as it would if padding were
        # a large negative number added to the scores.
        key_padding = key_padding | ~key_padding.any(-1, keepdim=True)
    backend = _backend(q, k.shape[1], key_padding is not None)
    most = _most_samples(q)
    if len(q) <= most:
        return backend(q, k, v, key_padding)
    parts = zip(*(x.split(most) for x in (q, k, v)), strict=True)
    reals = [None] * -(-len(q) // most) if key_padding is None else key_padding.split(most)
    return torch.cat([backend(*part, real) for part, real in zip(parts, reals, strict=True)])


def _most_samples(q: Tensor) -> int:
    """The most samples of one call: kernels on CUDA have 65,535 places for samples, or for the heads of all samples."""
    return GRID // q.shape[2] if q.device.type == "cuda" else len(q)


def key_block_mask(keys: Tensor, queries: int) -> BlockMask:
    """`keys` `B M` (True: real) as FlexAttention's mask for so many queries, made from the blocks of keys alone.

    A block of keys is left out if it has no real one, taken as it is if it has nothing else, and masked key by key
    otherwise. The largest tensor made has an element for each pair of a block of queries and a block of keys.
    """
    length = keys.shape[1]
    rows, columns = -(-queries // BLOCK), -(-length // BLOCK)
    blocks = F.pad(keys, (0, columns * BLOCK - length)).unflatten(1, (columns, BLOCK))
    full = blocks.all(-1)
    partial = blocks.any(-1) & ~full

    def listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
        """`B columns` -> how many columns each row has, `B 1 rows`, and which, those first: `B 1 rows columns`."""
        count = chosen.sum(-1, dtype=torch.int32)
        which = chosen.int().argsort(dim=-1, descending=True, stable=True).int()
        # The kernels count on plain strides, so the rows are copies.
        return count[:, None, None].repeat(1, 1, rows), which[:, None, None].repeat(1, 1, rows, 1)

    def real(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return keys[batch, key]

    return BlockMask.from_kv_blocks(
        *listed(partial), *listed(full), BLOCK_SIZE=BLOCK, mask_mod=real, seq_lengths=(queries, length)
    )


def _backend(q: Tensor, keys: int, padded: bool) -> Backend:
    """The function that computes attention on q's device."""
    if q.device.type == "cpu" and keys <= SHORT and torch.is_grad_enabled() and _computed_in(q) in HALF:
        return _explicit
    if are_fused(q.device):
        return _npu_fused
    if q.device.type != "cuda":
        return _sdpa
    if padded and HAS_TRITON and _computed_in(q) in HALF and 16 <= q.shape[3] <= 256:
        # Inside a compiled model it is part of that model's graph.
        return _flex if torch.compiler.is_compiling() else _compiled_flex()
    if not padded and _prefers_cudnn(q.device):
        return _cudnn
    return _sdpa


def _sdpa(q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None) -> Tensor:
    mask = None if keys is None else keys[:, None, None, :]
    if mask is not None and q.device.type == "npu":  # on some of which masks of bool were seen to go wrong
        mask = torch.zeros_like(mask, dtype=_computed_in(q)).masked_fill(~mask, -torch.inf)
    q, k, v = (_heads_first(x) for x in (q, k, v))
    return _heads_first(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def _npu_fused(q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None) -> Tensor:
    from osp.devices.npu import fused_attention  # here: it brings Lightning

    dtype = _computed_in(q)
    return fused_attention(q.to(dtype), k.to(dtype), v.to(dtype), keys)


def _explicit(q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None) -> Tensor:
    """Attention computed with the matrix of scores, in half precision except for the softmax's sums."""
    dtype = _computed_in(q)
    q, k, v = (_heads_first(x).to(dtype) for x in (q * q.shape[3] ** -0.5, k, v))
    scores = q @ k.transpose(2, 3)
    if keys is not None:
        scores = scores.masked_fill(~keys[:, None, None, :], -torch.inf)
    return _heads_first(torch.softmax(scores, dim=-1, dtype=dtype) @ v)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, keys: None) -> Tensor:
    """Attention by cuDNN if it has a kernel for these inputs (in half precision), else by the next that has one."""
    with sdpa_kernel(CUDNN_FIRST, set_priority=True):
        return _sdpa(q, k, v, keys)


def _flex(q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
    """Uncompiled on the CPU it is a reference: it makes the whole matrix, and has no gradients."""
    dtype = _computed_in(q)
    q, k, v = (_heads_first(x).to(dtype) for x in (q, k, v))
    return _heads_first(flex_attention(q, k, v, block_mask=key_block_mask(keys, q.shape[2])))


@cache
def _compiled_flex() -> Backend:
    """FlexAttention, compiled for calls outside a compiled model: uncompiled, it makes the whole matrix.

    It is compiled anew for self-attention or not, one sample or several, with or without gradients, and so on. Past a
    limit torch would go on uncompiled without a word; so here the limit is high, and reaching it is an error.
    """
    return torch._dynamo.config.patch(recompile_limit=VARIANTS)(torch.compile(_flex, fullgraph=True))


def _heads_first(x: Tensor) -> Tensor:
    """`B N H D` <-> `B H N D`, a view."""
    return x.transpose(1, 2)


def _computed_in(x: Tensor) -> torch.dtype:
    """The type that attention on x is computed in: autocast knows SDPA, but FlexAttention not in every release."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


@torch.compiler.assume_constant_result
def _prefers_cudnn(device: torch.device) -> bool:
    """On Hopper and newer cuDNN is the fastest, but not first in torch's own order in every release."""
    return torch.cuda.get_device_capability(device)[0] >= 9


def _check(q: Tensor, k: Tensor, v: Tensor, key_padding: Tensor | None) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[::2] != k.shape[::2] or q.shape[3] != k.shape[3]:
        raise UsageError(
            "attention takes q `B N H D` and k, v `B M H D`, "
            f"not {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    if key_padding is not None and (key_padding.dtype != torch.bool or key_padding.shape != k.shape[:2]):
        raise UsageError(
            f"key_padding is to be bool of shape `B M`, here {tuple(k.shape[:2])}, "
            f"not {key_padding.dtype} of {tuple(key_padding.shape)}"
        )
