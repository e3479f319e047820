"""Attention against its formula, on every path that a CPU can take."""

import math

import pytest
import torch
from torch import Tensor

from osp.devices import attention
from osp.errors import UsageError


def plain(q: Tensor, k: Tensor, v: Tensor, key_padding: Tensor | None = None) -> Tensor:
    """The formula, in float64, sample by sample, with the padded keys left out."""
    rows = []
    for sample in range(len(q)):
        one, keys, values = (x[sample].double().transpose(0, 1) for x in (q, k, v))
        if key_padding is not None and key_padding[sample].any():
            keys, values = keys[:, key_padding[sample]], values[:, key_padding[sample]]
        weights = (one @ keys.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1)
        rows.append((weights @ values).transpose(0, 1))
    return torch.stack(rows)


def drawn(batch: int, n: int, m: int, heads: int, dim: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, length, heads, dim, dtype=dtype) for length in (n, m, m)]


@pytest.mark.parametrize(("n", "m", "dim"), [(7, 7, 8), (300, 77, 72), (1, 260, 96)])
def test_it_is_the_formula(n: int, m: int, dim: int) -> None:
    q, k, v = drawn(3, n, m, 2, dim)
    real = torch.rand(3, m) < 0.5
    real[1] = False
    for padding in (None, real):
        torch.testing.assert_close(attention(q, k, v, padding).double(), plain(q, k, v, padding), atol=1e-5, rtol=1e-5)


def test_wrong_shapes_are_told() -> None:
    q, k, v = drawn(2, 3, 5, 2, 8)
    with pytest.raises(UsageError, match="attention takes q"):
        attention(q, k, v[:, 1:])
    with pytest.raises(UsageError, match="key_padding is to be bool"):
        attention(q, k, v, torch.ones(2, 3, dtype=torch.bool))
