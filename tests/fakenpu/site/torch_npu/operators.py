"""Ascend's fused operators by their formulas, under the signatures that torch-npu 2.13.0 registers.

As on the hardware, what its documentation rules out is an error: masks that are broadcast over queries, types that
differ, more than 768 channels of a head, more than 1000 samples or heads that are rotated. Beyond 512 keys the mask is
ignored, as users reported.
"""

from typing import Any

import torch
from torch import Tensor, library

SIGNATURES = (
    "npu_fusion_attention(Tensor query, Tensor key, Tensor value, int head_num, str input_layout, Tensor? pse=None, "
    "Tensor? padding_mask=None, Tensor? atten_mask=None, float scale=1., float keep_prob=1., "
    "int pre_tockens=2147483647, int next_tockens=2147483647, int inner_precise=0, int[]? prefix=None, "
    "int[]? actual_seq_qlen=None, int[]? actual_seq_kvlen=None, int sparse_mode=0, bool gen_mask_parallel=True, "
    'bool sync=False, str softmax_layout="", Tensor? sink=None, Tensor? dropout_mask=None, int seed=0, int offset=0) '
    "-> (Tensor, Tensor, Tensor, Tensor, int, int, int)",
    "npu_rms_norm(Tensor input, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor)",
    "npu_rotary_mul(Tensor input, Tensor r1, Tensor r2, str rotary_mode='half', Tensor? rotate=None) -> Tensor",
)

calls: list[tuple[str, dict[str, Any]]] = []
"""The calls that were made, for tests to look at."""

_library = library.Library("npu", "DEF")
for _signature in SIGNATURES:
    _library.define(_signature)


def _same_type(*tensors: Tensor) -> None:
    assert len({(tensor.dtype, tensor.device) for tensor in tensors}) == 1, "types or devices differ"


def npu_fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    *others: Any,
) -> Any:
    mask = atten_mask
    assert pse is None
    assert padding_mask is None
    assert keep_prob == 1.0
    calls.append(("npu_fusion_attention", {"layout": input_layout, "mask": mask, "channels": query.shape[3]}))
    _same_type(query, key, value)
    assert query.shape[3] <= 768, "Dq must be in [1, 768]"
    q, k, v = (x.transpose(1, 2) if input_layout == "BSND" else x for x in (query, key, value))
    assert q.shape[1] == head_num
    scores = (q @ k.transpose(2, 3)).float() * scale
    if mask is not None:
        assert mask.dtype in (torch.bool, torch.uint8)
        assert mask.shape[-2:] == scores.shape[-2:], "atten_mask must be BNSS, B1SS, 11SS or SS"
        if k.shape[2] <= 512:
            scores = scores.masked_fill(mask.bool(), -torch.inf)
    out = scores.softmax(-1).to(v.dtype) @ v
    most = scores.detach().amax(-1)
    return (out.transpose(1, 2) if input_layout == "BSND" else out), most, most, most, 0, 0, 0


def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-06) -> tuple[Tensor, Tensor]:
    calls.append(("npu_rms_norm", {"shape": input.shape}))
    _same_type(input, gamma)
    scale = (input.float().square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return (input.float() * scale * gamma.float()).to(input.dtype), scale


def npu_rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    calls.append(("npu_rotary_mul", {"shape": input.shape}))
    _same_type(input, r1, r2)
    assert input.ndim == r1.ndim == r2.ndim == 4
    assert r1.shape[3] == input.shape[3] < 896, "1S1D, BS1D or BSND"
    assert input.shape[0] < 1000
    assert input.shape[2] < 1000
    assert rotary_mode == "half"
    assert rotate is None
    first, second = input.chunk(2, -1)
    return r1 * input + r2 * torch.cat((-second, first), -1)


# Composed of other operators, so that autograd follows.
for _operator in (npu_fusion_attention, npu_rms_norm, npu_rotary_mul):
    _library.impl(_operator.__name__, _operator, "CompositeImplicitAutograd")
