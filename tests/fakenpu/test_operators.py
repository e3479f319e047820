"""The fused operators: their signatures, and what is made of them against formulas in double precision."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from osp.denoiser import JointTransformer
from osp.denoiser.rotary import rotate
from osp.devices import attention, choose_device, choose_kernels
from osp.devices.npu import driver, fused_attention, fused_rms_norm, fused_rotary

FROZEN = {
    "npu_fusion_attention": (
        "npu::npu_fusion_attention(Tensor query, Tensor key, Tensor value, int head_num, str input_layout, "
        "Tensor? pse=None, Tensor? padding_mask=None, Tensor? atten_mask=None, float scale=1., float keep_prob=1., "
        "SymInt pre_tockens=2147483647, SymInt next_tockens=2147483647, SymInt inner_precise=0, "
    ),
    "npu_rms_norm": "npu::npu_rms_norm(Tensor input, Tensor gamma, float epsilon=",
    "npu_rotary_mul": 'npu::npu_rotary_mul(Tensor input, Tensor r1, Tensor r2, str rotary_mode="half", ',
}
"""The beginnings of the signatures in torch-npu 2.13.0."""


@pytest.fixture(autouse=True)
def calls() -> Iterator[list[tuple[str, dict[str, Any]]]]:
    """The calls of operators in a test; afterwards the choice of kernels is plain again."""
    driver()
    from torch_npu import operators

    operators.calls.clear()
    yield operators.calls
    choose_kernels("plain")


def formula(q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
    """`B N H D`, sample by sample, without the keys that are not real."""
    samples = []
    for number in range(len(q)):
        query, keys, values = (x[number].double().cpu().transpose(0, 1) for x in (q, k, v))
        if real is not None:
            keys, values = keys[:, real[number].cpu()], values[:, real[number].cpu()]
        samples.append(((query @ keys.mT * q.shape[3] ** -0.5).softmax(-1) @ values).transpose(0, 1))
    return torch.stack(samples)


def drawn(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).to(choose_device("npu"), dtype).requires_grad_() for shape in shapes]


def agree(function: Callable[..., Tensor], wanted: Callable[..., Tensor], inputs: list[Tensor], near: float) -> None:
    """Values and gradients of both are the same up to `near`, relative to the largest."""
    out, there = function(*inputs), wanted(*inputs)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert out.device.type == "npu"
    mine = torch.autograd.grad((out.double() * weight.to(out.device)).sum(), inputs)
    theirs = torch.autograd.grad((there * weight.to(there.device)).sum(), inputs)
    for one, other in zip([out, *mine], [there, *theirs], strict=True):
        one, other = one.detach().double().cpu(), other.detach().double().cpu()
        assert (one - other).abs().max() <= near * other.abs().max()


@pytest.mark.parametrize("name", FROZEN)
def test_signatures_are_those_that_we_call(name: str) -> None:
    driver()
    said = str(getattr(torch.ops.npu, name).default._schema)
    wanted = FROZEN[name].replace("SymInt", "int")
    plain = said.replace("SymInt", "int").replace("1.,", "1.,").replace("'", '"')
    assert plain.startswith(wanted)


@pytest.mark.parametrize("layout", ["BSND", "BNSD"])
@pytest.mark.parametrize("keys", [40, 600])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_is_the_formula_with_gradients(layout: str, keys: int, padded: bool, calls: list[Any]) -> None:
    inputs = drawn((2, 9, 3, 24), (2, keys, 3, 24), (2, keys, 3, 24))
    real = torch.arange(keys) < torch.tensor([[keys - 7], [3]]) if padded else None
    there = None if real is None else real.to(inputs[0].device)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layout == "BSND":
            return fused_attention(q, k, v, there)
        return fused_attention(*(x.transpose(1, 2) for x in (q, k, v)), there, layout=layout).transpose(1, 2)

    agree(ours, lambda q, k, v: formula(q, k, v, real), inputs, 1e-5)
    ((_, call),) = calls
    assert call["layout"] == layout
    mask = call["mask"]
    if padded and keys <= 512:  # True is left out, and nothing is broadcast over the queries
        assert torch.equal(mask.cpu(), ~real[:, None, None].expand(2, 1, 9, keys))
    else:
        assert mask is None
    assert call["channels"] == (32 if padded and keys > 512 else 24)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_padded_key_has_no_weight_at_all_in_half_precision(dtype: torch.dtype) -> None:
    q, k, v = (x.detach() for x in drawn((1, 5, 2, 72), (1, 700, 2, 72), (1, 700, 2, 72), dtype=dtype))
    real = (torch.arange(700) % 3 == 0)[None].to(q.device)
    v = torch.where(real[:, :, None, None], v, torch.full_like(v, 1e4))
    out = fused_attention(q, k, v, real)
    assert out.abs().max() < 10
    torch.testing.assert_close(out.cpu().double(), formula(q, k, v, real), atol=0.02, rtol=0.02)


def test_heads_that_are_too_wide_and_other_layouts_are_refused() -> None:
    q = torch.zeros(1, 2, 1, 784, device=choose_device("npu"))
    with pytest.raises(ValueError, match="heads of 784 channels: npu_fusion_attention takes at most 768"):
        fused_attention(q, q, q)
    with pytest.raises(ValueError, match="layout='TND': choose BSND or BNSD"):
        fused_attention(q, q, q, layout="TND")


@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm_is_the_formula_with_gradients(weighted: bool) -> None:
    x, weight = drawn((2, 5, 3, 16), (16,))

    def wanted(x: Tensor, weight: Tensor) -> Tensor:
        scaled = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * weight.double() if weighted else scaled + 0 * weight

    ours = fused_rms_norm if weighted else (lambda x, weight: fused_rms_norm(x) + 0 * weight)
    agree(ours, wanted, [x, weight], 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_our_own_with_gradients(dtype: torch.dtype) -> None:
    (x,) = drawn((2, 7, 3, 16), dtype=dtype)
    angle = torch.rand(7, 1, 8, generator=torch.Generator().manual_seed(2))
    cos, sin = angle.cos().to(x.device), angle.sin().to(x.device)
    near = 1e-5 if dtype == torch.float32 else 1e-2
    agree(lambda x: fused_rotary(x, cos, sin), lambda x: rotate(x, cos, sin).double(), [x], near)


def joint() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"channels": 4, "out_channels": 4, "heads": 2, "head_dim": 16, "text_channels": 8, "pooled_channels": 8}
    model = JointTransformer(**sizes, modulation_width=8, stages=[{"blocks": 2}])
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.to(choose_device("npu"))


def test_a_model_takes_them_only_where_they_are_chosen(calls: list[Any]) -> None:
    model, device = joint(), choose_device("npu")
    torch.manual_seed(1)
    latent, time, text = torch.randn(2, 4, 2, 4, 4), torch.tensor([200.0, 700.0]), torch.randn(2, 5, 8)
    mask = torch.arange(5) < torch.tensor([[5], [3]])
    inputs = [x.to(device) for x in (latent, time, text, mask, text.mean(1))]

    def run() -> Tensor:
        out = model(inputs[0], inputs[1], inputs[2], text_mask=inputs[3], pooled_text=inputs[4])
        return out.detach().cpu()

    plain = run()
    assert not calls
    choose_kernels("fused")
    torch.testing.assert_close(run(), plain, atol=1e-4, rtol=1e-4)
    assert {name for name, _ in calls} == {*FROZEN}


def test_plain_attention_gives_torch_no_mask_of_bool(monkeypatch: pytest.MonkeyPatch) -> None:
    """On some NPUs such masks are computed wrongly."""
    seen = []
    sdpa = nn.functional.scaled_dot_product_attention

    def watched(*tensors: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        seen.append(attn_mask)
        return sdpa(*tensors, attn_mask=attn_mask)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watched)
    inputs = drawn((2, 9, 3, 24), (2, 20, 3, 24), (2, 20, 3, 24))
    real = torch.arange(20) < torch.tensor([[20], [4]])
    agree(lambda *x: attention(*x, real.to(x[0].device)), lambda *x: formula(*x, real), inputs, 1e-5)
    assert [mask.dtype for mask in seen] == [torch.float32]


def test_every_operator_is_held(calls: list[Any]) -> None:
    from osp.devices.npu import operators

    named = {name for name in FROZEN if f".{name}(" in inspect.getsource(operators)}
    assert named == {*FROZEN}
