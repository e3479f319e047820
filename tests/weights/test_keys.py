"""Tensors that are several published ones, rows in another order, and keys that are dropped."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from osp.weights import WeightImportError, load_published, to_published
from osp.weights.families import FAMILIES
from osp.weights.keys import KeyPair
from osp.weights.layout import Family, Kind, Layout

ROWS = (2, 0, 3, 1)


class Fused(nn.Module):
    """q, k and v in one; q and k with their rows in another order."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.settings = {"width": width}
        self.qkv = nn.Linear(width, 3 * width)
        self.norm = nn.LayerNorm(width)


def build(settings: Mapping[str, Any], weights: Mapping[str, Any]) -> Fused:
    return Fused(**settings)


def pairs(model: Fused) -> list[KeyPair]:
    size, rows = model.settings["width"], (ROWS, ROWS, None)
    return [
        KeyPair("qkv.weight", ("q.weight", "k.weight", "v.weight"), (size, size), rows),
        KeyPair("qkv.bias", ("q.bias", "k.bias", "v.bias"), (size,), rows),
        KeyPair("norm.weight", ("norm.weight",), (size,), (ROWS,)),
        KeyPair("norm.bias", ("norm.bias",), (size,)),
    ]


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Published ones, of a kind that is known for the length of a test."""
    layout = Layout(lambda _: "FusedModel", pairs, lambda model: model.settings, lambda _: {"dead.weight": (7, 7)})
    kinds = {"fused": Kind(build, {}, ({"width": 3}, {"width": 4}))}
    monkeypatch.setitem(FAMILIES, "fused", Family("fused", Fused, layout, kinds))
    torch.manual_seed(0)
    keys = {
        f"{layer}.{name}": torch.randn(4, 4)[: 4 if name == "weight" else 1]
        for layer in "qkv"
        for name in ("weight", "bias")
    }
    keys = {key: value if key.endswith("weight") else value[0] for key, value in keys.items()}
    return keys | {"norm.weight": torch.randn(4), "norm.bias": torch.randn(4)}


def test_rows_are_reordered_for_each_key_and_back(weights: dict[str, Tensor]) -> None:
    model = load_published("fused", weights)
    q, k, v = model.qkv.weight.unflatten(0, (3, 4)).unbind()
    assert torch.equal(q, weights["q.weight"][[*ROWS]])
    assert torch.equal(k, weights["k.weight"][[*ROWS]])
    assert torch.equal(v, weights["v.weight"])
    assert torch.equal(model.qkv.bias[:4], weights["q.bias"][[*ROWS]])
    assert torch.equal(model.norm.weight, weights["norm.weight"][[*ROWS]])
    assert torch.equal(model.norm.bias, weights["norm.bias"])
    back = to_published(model)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], value) for key, value in weights.items())


def test_a_key_that_no_output_depends_on_may_be_there_if_it_fits(weights: dict[str, Tensor]) -> None:
    model = load_published("fused", weights | {"dead.weight": torch.ones(7, 7)})
    assert to_published(model).keys() == weights.keys()
    with pytest.raises(WeightImportError, match=r"1 of another shape: dead\.weight \(\(7,\) instead of \(7, 7\)\)"):
        load_published("fused", weights | {"dead.weight": torch.ones(7)})
    with pytest.raises(WeightImportError, match=r"1 unknown: dead\.bias$"):
        load_published("fused", weights | {"dead.weight": torch.ones(7, 7), "dead.bias": torch.ones(7)})
