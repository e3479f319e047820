"""Attention against its formula, on every path that a CPU can take."""

import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from osp.devices import attention
from osp.errors import UsageError

module: Any = importlib.import_module("osp.devices.attention")  # the package's name for it is the function


def formula(q: Tensor, k: Tensor, v: Tensor, key_padding: Tensor | None = None) -> Tensor:
    """In float64, sample by sample, with the padded keys left out."""
    samples = []
    for sample in range(len(q)):
        query, keys, values = (x[sample].double().transpose(0, 1) for x in (q, k, v))
        if key_padding is not None and key_padding[sample].any():
            keys, values = keys[:, key_padding[sample]], values[:, key_padding[sample]]
        weights = (query @ keys.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(-1)
        samples.append((weights @ values).transpose(0, 1))
    return torch.stack(samples)


def drawn(batch: int, n: int, m: int, heads: int, dim: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(batch, length, heads, dim, dtype=dtype) for length in (n, m, m)]


def holes(batch: int, m: int) -> Tensor:
    """Half the keys, all of the first sample's first blocks and none of its last, none at all of the second's."""
    torch.manual_seed(1)
    real = torch.rand(batch, m) < 0.5
    real[0, : m // 2], real[0, -m // 4 :] = True, False
    real[1:2] = False
    return real


@pytest.mark.parametrize(("n", "m", "dim"), [(7, 7, 8), (300, 77, 72), (1, 260, 96), (130, 1, 128)])
def test_it_is_the_formula(n: int, m: int, dim: int) -> None:
    q, k, v = drawn(3, n, m, 2, dim)
    for padding in (None, holes(3, m)):
        out = attention(q, k, v, padding)
        assert out.shape == q.shape
        torch.testing.assert_close(out.double(), formula(q, k, v, padding), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("padded", [True, False])
def test_many_samples_go_through_in_parts(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_most_samples", lambda q: 3)
    inputs = [x.requires_grad_() for x in drawn(8, 5, 4, 2, 8)]
    padding = holes(8, 4) if padded else None
    out = attention(*inputs, padding)
    torch.testing.assert_close(out.double(), formula(*inputs, padding), atol=2e-6, rtol=1e-5)
    ours = torch.autograd.grad(out.square().sum(), inputs)
    theirs = torch.autograd.grad(formula(*inputs, padding).square().sum(), inputs)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("padded", [True, False])
def test_training_in_half_precision_with_few_keys(padded: bool) -> None:
    q, k, v = (x.requires_grad_() for x in drawn(3, 40, 30, 2, 16))
    padding = holes(3, 30) if padded else None
    expected = torch.autograd.grad(formula(q, k, v, padding).square().sum(), (q, k, v))
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v, padding)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), formula(q, k, v, padding), atol=0.03, rtol=0.03)
    for ours, theirs in zip(torch.autograd.grad(out.float().square().sum(), (q, k, v)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0.1, rtol=0.1)


def test_slices_of_a_fused_projection() -> None:
    q, k, v = torch.randn(2, 50, 3, 4, 24, generator=torch.Generator().manual_seed(0)).unbind(2)
    out = attention(q, k, v, holes(2, 50))
    torch.testing.assert_close(out, formula(q, k, v, holes(2, 50)).float())
    assert out.is_contiguous()  # token by token, ready for the output's projection


def test_padded_keys_are_without_effect_and_a_sample_without_keys_sees_all() -> None:
    q, k, v = drawn(2, 5, 9, 2, 16)
    real = torch.arange(9) < torch.tensor([[6], [0]])
    out = attention(q, k, v, real)
    torch.testing.assert_close(out[:1], attention(q[:1], k[:1, :6], v[:1, :6]))
    torch.testing.assert_close(out[1:], attention(q[1:], k[1:], v[1:]))
    torch.testing.assert_close(attention(q, k, v, torch.ones(2, 9, dtype=torch.bool)), attention(q, k, v))


@pytest.mark.parametrize(("n", "m"), [(0, 4), (4, 0), (0, 0)])
@pytest.mark.parametrize("padded", [True, False])
def test_nothing_to_ask_or_to_look_at(n: int, m: int, padded: bool) -> None:
    q, k, v = (x.requires_grad_() for x in drawn(2, n, m, 3, 8))
    out = attention(q, k, v, torch.ones(2, m, dtype=torch.bool) if padded else None)
    assert torch.equal(out, torch.zeros(2, n, 3, 8))
    out.sum().backward()


@pytest.mark.parametrize("padded", [True, False])
def test_gradients(padded: bool) -> None:
    inputs = [x.requires_grad_() for x in drawn(2, 4, 5, 2, 3, torch.float64)]
    padding = holes(2, 5) if padded else None
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, padding), inputs)


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that an operation gave."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


@pytest.mark.parametrize("padded", [True, False])
def test_no_matrix_of_queries_by_keys(padded: bool) -> None:
    n = 512
    q, k, v = (x.requires_grad_() for x in drawn(1, n, n, 2, 16))
    with Largest() as largest:
        attention(q, k, v, holes(1, n) if padded else None).sum().backward()
        assert q.grad is not None
    assert largest.elements <= n * 2 * 16
    with Largest() as largest:
        module.key_block_mask(holes(1, n), n)
    assert largest.elements <= n


def test_what_does_not_fit_is_told() -> None:
    q, k, v = drawn(2, 3, 5, 2, 8)
    wrong = [(q, k, v[:, 1:]), (q[0], k, v), (q, k[0], v[0]), (q[:1], k, v), (q[:, :, :1], k, v), (q[..., :4], k, v)]
    for inputs in wrong:
        with pytest.raises(UsageError, match="attention takes q `B N H D` and k, v `B M H D`, not"):
            attention(*inputs)
    for mask in (torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 5), torch.ones(2, 1, 1, 5, dtype=torch.bool)):
        with pytest.raises(UsageError, match=r"key_padding is to be bool of shape `B M`, here \(2, 5\), not"):
            attention(q, k, v, mask)


@pytest.mark.parametrize(("batch", "n", "m"), [(1, 1, 5), (2, 100, 128), (3, 300, 513), (2, 256, 700)])
def test_the_block_mask_is_that_of_the_full_mask(batch: int, n: int, m: int) -> None:
    real = holes(batch, m)
    ours = module.key_block_mask(real, n)
    # Torch takes no block for full that the end of the queries cuts, so give it whole ones.
    whole = -(-n // module.BLOCK) * module.BLOCK
    theirs = create_block_mask(lambda b, h, query, key: real[b, key], batch, 1, whole, m, device="cpu")
    assert ours.shape == (batch, 1, n, m)
    for kind in ("kv", "full_kv", "q", "full_q"):
        counts, wanted = (getattr(mask, f"{kind}_num_blocks") for mask in (ours, theirs))
        assert torch.equal(counts, wanted)
        which, expected = (getattr(mask, f"{kind}_indices") for mask in (ours, theirs))
        assert which.dtype == torch.int32
        assert which.is_contiguous()
        listed = torch.arange(which.shape[-1]) < counts[..., None]
        assert torch.equal(which[listed], expected[listed])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_gives_the_same() -> None:
    q, k, v = drawn(3, 130, 300, 2, 72)
    real = holes(3, 300) | (torch.arange(3) == 1)[:, None]
    out = module._flex(q, k, v, real)
    torch.testing.assert_close(out, module._sdpa(q, k, v, real))
    assert out.is_contiguous()


@pytest.mark.parametrize("path", ["_sdpa", "_cudnn", "_flex"])
def test_a_compiled_model_has_one_graph(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(module, "_backend", lambda q, keys, padded: getattr(module, path))
    graphs = []

    def count(graph: Any, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def block(qkv: Tensor, real: Tensor | None) -> Tensor:
        q, k, v = qkv.unbind(2)
        return attention(q * 2, k, v, real).flatten(2).tanh()

    compiled = torch.compile(block, fullgraph=True, backend=count)
    for n in (140, 130, 150):
        real = None if path == "_cudnn" else holes(2, n)
        qkv = torch.randn(2, n, 3, 2, 16)
        q, k, v = qkv.unbind(2)
        torch.testing.assert_close(compiled(qkv, real), formula(q * 2, k, v, real).flatten(2).tanh().float())
    assert len(graphs) <= 2  # for one length, then for any


@pytest.mark.parametrize(
    ("dtype", "dim", "padded", "capability", "triton", "wanted"),
    [
        (torch.bfloat16, 72, True, 8, True, "_compiled_flex"),
        (torch.bfloat16, 72, True, 8, False, "_sdpa"),
        (torch.bfloat16, 8, True, 9, True, "_sdpa"),
        (torch.float32, 72, True, 9, True, "_sdpa"),
        (torch.bfloat16, 72, False, 9, True, "_cudnn"),
        (torch.float16, 96, False, 8, True, "_sdpa"),
    ],
)
def test_the_backend_on_cuda(
    dtype: torch.dtype,
    dim: int,
    padded: bool,
    capability: int,
    triton: bool,
    wanted: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    monkeypatch.setattr(module, "HAS_TRITON", triton)
    monkeypatch.setattr(module, "_compiled_flex", lambda: "_compiled_flex")
    with FakeTensorMode():
        chosen = module._backend(torch.empty(1, 4, 2, dim, dtype=dtype, device="cuda"), 4, padded)
    assert chosen == (wanted if wanted == "_compiled_flex" else getattr(module, wanted))


def test_autocast_decides_the_type() -> None:
    q = torch.empty(1, 2, 3, 4)
    assert module._computed_in(q) == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module._computed_in(q) == torch.bfloat16
        assert attention(q, q, q).dtype == torch.bfloat16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dim", [8, 64, 72, 96, 128])
@pytest.mark.parametrize(("batch", "n", "m"), [(3, 300, 300), (3, 40, 77), (3, 256, 513), (70_000, 2, 3)])
def test_on_cuda(dim: int, batch: int, n: int, m: int) -> None:
    if batch > 3 and dim != 64:
        pytest.skip("many samples are tried at one size of a head")
    inputs = drawn(batch, n, m, 2, dim, torch.bfloat16)
    for padding in (None, holes(batch, m)):
        there = [x.cuda().requires_grad_() for x in inputs]
        out = attention(*there, None if padding is None else padding.cuda())
        out.float().square().sum().backward()
        here = [x[-50:].double().requires_grad_() for x in inputs]  # samples have nothing to do with each other
        wanted = formula(here[0], here[1], here[2], None if padding is None else padding[-50:])
        wanted.square().sum().backward()
        torch.testing.assert_close(out[-50:].cpu().double(), wanted, atol=2e-2, rtol=2e-2)
        for x, y in zip(there, here, strict=True):
            assert x.grad is not None
            assert y.grad is not None
            assert (x.grad[-50:].cpu().double() - y.grad).norm() < 0.02 * y.grad.norm()
