"""Ascend's fused operators: attention, RMSNorm and rotary positions, each with the meaning of torch's own formula.

They are given only what is known to be right in every release: see `fused_attention`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .driver import driver

MASKED_KEYS = 512  # up to which the operator's mask is used: beyond it masks were seen to be ignored
LARGEST_HEAD = 768
_ALIGNED = 16  # channels that heads are filled up to
_LEFT_OUT = -30000.0  # within float16; divided by the square root of 768 it still makes exp() zero


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, key_padding: Tensor | None = None, *, layout: str = "BSND"
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v by `npu_fusion_attention`, of q's shape.

    `layout` `BSND`: q `B N H D`, k and v `B M H D`; `BNSD`: q `B H N D`, k and v `B H M D`. `key_padding` `B M` is
    True where a key takes part; each sample must have such a key. Raises ValueError for another layout and for heads of
    more than 768 channels (752 where more than 512 keys are padded).

    Three kinds of calls that were reported to give wrong results or errors are not made. A mask is always given as
    `B 1 N M`, never broadcast over the queries. Beyond 512 keys no mask is given at all: a further channel, one in the
    queries and a large negative number in the keys to be left out, adds the same to the scores. And `TND` is not
    offered.
    """
    if layout not in ("BSND", "BNSD"):
        raise ValueError(f"layout={layout!r}: choose BSND or BNSD")
    size = q.shape[3]
    sequence, heads = (1, 2) if layout == "BSND" else (2, 1)
    mask = None
    if key_padding is not None and k.shape[sequence] <= MASKED_KEYS:
        # True is left out here, the opposite of torch's own meaning.
        mask = (~key_padding)[:, None, None].repeat(1, 1, q.shape[sequence], 1)
    elif key_padding is not None:
        q, k, v = _with_channel(q, k, v, key_padding, sequence)
    if q.shape[3] > LARGEST_HEAD:
        raise ValueError(f"heads of {q.shape[3]} channels: npu_fusion_attention takes at most {LARGEST_HEAD}")
    out = _operators().npu_fusion_attention(
        q, k, v, q.shape[heads], layout, atten_mask=mask, scale=size**-0.5, keep_prob=1.0
    )[0]
    return out[..., :size]


def fused_rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) weight over the last dimension by `npu_rms_norm`, in x's type."""
    # The operator wants a weight, and of x's type.
    weight = x.new_ones(x.shape[-1]) if weight is None else weight.to(x.dtype)
    return _operators().npu_rms_norm(x, weight, epsilon=eps)[0]


def fused_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`B N H D` with channel i rotated with channel i + D/2 by `npu_rotary_mul`, computed in the tables' type.

    `cos` and `sin` `N 1 D/2` have one angle a pair.
    """
    cos, sin = (torch.cat((table, table), dim=-1)[None] for table in (cos, sin))
    return _operators().npu_rotary_mul(x.to(cos.dtype).contiguous(), cos, sin, "half").to(x.dtype)


def _with_channel(q: Tensor, k: Tensor, v: Tensor, key_padding: Tensor, sequence: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v with one channel more, and zeros up to a multiple of 16; its product is what masked scores get added."""
    added = -(-(q.shape[3] + 1) // _ALIGNED) * _ALIGNED - q.shape[3]
    shape = [len(k), 1, 1, 1]
    shape[sequence] = k.shape[sequence]
    left_out = (~key_padding).to(k.dtype).mul(_LEFT_OUT).reshape(shape).expand(*k.shape[:3], 1)
    q, k, v = (F.pad(x, (0, added)) for x in (q, k, v))
    size = q.shape[3] - added
    ones = torch.zeros_like(q[:1, :1, :1])
    ones[..., size] = 1
    return q + ones, torch.cat((k[..., :size], left_out, k[..., size + 1 :]), dim=-1), v


def _operators() -> "torch._ops._OpNamespace":
    driver()  # which brings them
    return torch.ops.npu
