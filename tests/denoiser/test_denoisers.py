"""What both transformers promise, whatever their weights."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from osp.denoiser import CrossTransformer, Denoiser, JointTransformer, Stage, restage
from osp.denoiser.patterns import Pattern
from osp.denoiser.rotary import rotary_tables
from osp.errors import UsageError

SPARSE = [Stage(1), Stage(2, "skiparse", 2), Stage(1)]
CROSS: dict[str, Any] = {"channels": 4, "out_channels": 4, "heads": 2, "head_dim": 12, "text_channels": 10}
JOINT = CROSS | {"head_dim": 16, "pooled_channels": 6, "modulation_width": 8}


def make(kind: type[Denoiser], stages: Any = SPARSE, **settings: Any) -> Denoiser:
    """A small model of which every weight matters."""
    torch.manual_seed(0)
    model = kind(stages=stages, **((CROSS if kind is CrossTransformer else JOINT) | settings))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def given(model: Denoiser, batch: int = 2, size: tuple[int, int, int] = (3, 6, 10), text: int = 5) -> dict[str, Tensor]:
    """Inputs that go with it."""
    generator = torch.Generator().manual_seed(1)
    made = {
        "latent": torch.randn(batch, model.latent_channels, *size, generator=generator),
        "time": 1000 * torch.rand(batch, generator=generator),
        "text": torch.randn(batch, text, model.text_channels, generator=generator),
    }
    if model.pooled_channels is not None:
        made["pooled_text"] = torch.randn(batch, model.pooled_channels, generator=generator)
    return made


NO_SKIPS: dict[type[Denoiser], dict[str, Any]] = {CrossTransformer: {}, JointTransformer: {"long_skips": False}}
KINDS = pytest.mark.parametrize("kind", [CrossTransformer, JointTransformer])
ALL_PATTERNS = [
    Stage(1),
    Stage(2, "2+1d"),
    Stage(2, "skiparse", 3),
    Stage(2, "skip_window", 2),
    Stage(2, "skiparse_2d", 2),
]


def test_no_pattern_is_left_out(pattern_kinds: set[type[Pattern]]) -> None:
    assert {type(pattern) for stage in ALL_PATTERNS for pattern in stage.patterns} == pattern_kinds


@KINDS
@torch.no_grad()
def test_a_batch_gives_what_its_samples_give(kind: type[Denoiser]) -> None:
    model = make(kind, ALL_PATTERNS, **NO_SKIPS[kind]).double()
    inputs = {key: value.double() for key, value in given(model).items()}
    together = model(**inputs)
    for i in range(2):
        alone = model(**{key: value[i : i + 1] for key, value in inputs.items()})
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-9)


@KINDS
@pytest.mark.parametrize("stages", [SPARSE, ALL_PATTERNS])
@torch.no_grad()
def test_what_is_masked_does_not_matter(kind: type[Denoiser], stages: list[Stage]) -> None:
    model = make(kind, stages).double()
    inputs = {key: value.double() for key, value in given(model).items()}
    text_mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    video_mask = torch.ones(2, 3, 6, 10)
    video_mask[0, :, 4:], video_mask[1, :, :, 8:] = 0, 0
    one = model(**inputs, text_mask=text_mask, video_mask=video_mask)
    hidden = {"text": text_mask[..., None] == 0, "latent": video_mask[:, None] == 0}
    other = inputs | {
        key: torch.where(where, torch.randn_like(inputs[key]), inputs[key]) for key, where in hidden.items()
    }
    two = model(**other, text_mask=text_mask, video_mask=video_mask)
    seen = (video_mask[:, None] == 1).expand_as(one)
    torch.testing.assert_close(one[seen], two[seen], rtol=0, atol=1e-9)
    assert (model(**other)[seen] - one[seen]).abs().max() > 1e-3


@KINDS
@torch.no_grad()
def test_masks_of_ones_are_no_masks_and_text_is_cut(kind: type[Denoiser]) -> None:
    model = make(kind).double()
    inputs = {key: value.double() for key, value in given(model).items()}
    plain = model(**inputs)
    masked = model(**inputs, text_mask=torch.ones(2, 5), video_mask=torch.ones(2, 3, 6, 10))
    assert torch.equal(plain, masked)
    longer = inputs | {"text": torch.nn.functional.pad(inputs["text"], (0, 0, 0, 4), value=7.0)}
    mask = torch.tensor([[1] * 5 + [0] * 4] * 2)
    lengths: list[int] = []
    hook = model.blocks[0].register_forward_pre_hook(lambda _, args: lengths.append(args[1].shape[1]))
    torch.testing.assert_close(model(**longer, text_mask=mask), plain, rtol=0, atol=1e-9)
    hook.remove()
    assert lengths == [5]


@KINDS
@torch.no_grad()
def test_an_empty_prompt_beside_another(kind: type[Denoiser]) -> None:
    """As published: where text is attended to by itself, a prompt masked whole counts as wholly real."""
    model = make(kind).double()
    inputs = {key: value.double() for key, value in given(model).items()}
    both = model(**inputs, text_mask=torch.tensor([[0] * 5, [1, 1, 0, 0, 0]]))
    first = {key: value[:1] for key, value in inputs.items()}
    same = {} if kind is CrossTransformer else {"text_mask": torch.zeros(1, 5)}
    torch.testing.assert_close(both[:1], model(**first, **same), rtol=0, atol=1e-9)
    other = {"text_mask": torch.zeros(1, 5)} if kind is CrossTransformer else {"text_mask": torch.ones(1, 5)}
    assert torch.allclose(model(**first, **other), both[:1]) == (kind is CrossTransformer)


@KINDS
@torch.no_grad()
def test_a_patch_that_is_partly_real_is_real(kind: type[Denoiser]) -> None:
    model = make(kind)
    inputs, part = given(model), torch.ones(2, 3, 6, 10)
    part[:, :, ::2, 1::2] = 0
    assert torch.equal(model(**inputs, video_mask=part), model(**inputs))


@torch.no_grad()
def test_precise_parts_stay_precise(monkeypatch: pytest.MonkeyPatch) -> None:
    """In half precision v1.5 norms, modulates, gates and rotates in float32; v1.3 does not."""
    for kind, expected in ((JointTransformer, torch.float32), (CrossTransformer, torch.bfloat16)):
        seen: dict[str, set[torch.dtype]] = {"norm": set(), "gate": set(), "rotary": set()}
        real_norm, real_gate = torch.nn.functional.layer_norm, torch.addcmul

        def norm(x: Tensor, *rest: Any, **more: Any) -> Tensor:
            seen["norm"].add(x.dtype)  # noqa: B023
            return real_norm(x, *rest, **more)  # noqa: B023

        def gate(x: Tensor, *rest: Any) -> Tensor:
            seen["gate"].add(x.dtype)  # noqa: B023
            return real_gate(x, *rest)  # noqa: B023

        with monkeypatch.context() as patched:
            patched.setattr(torch.nn.functional, "layer_norm", norm)
            patched.setattr(torch, "addcmul", gate)
            model = make(kind).bfloat16()
            hook = model.blocks[0].register_forward_pre_hook(
                lambda _, args: seen["rotary"].add(next(a for a in args if isinstance(a, tuple))[0].dtype)  # noqa: B023
            )
            model(**given(model))
            hook.remove()
        assert seen == {name: {expected} for name in seen}


@KINDS
@pytest.mark.parametrize("every", [1, 2])
def test_checkpointed_blocks_give_the_same_gradients(kind: type[Denoiser], every: int) -> None:
    model = make(kind).double()
    inputs = {key: value.double() for key, value in given(model).items()}
    gradients, calls = [], []
    hooks = [block.register_forward_pre_hook(lambda *_: calls.append(1)) for block in model.blocks]
    for model.recompute_every in (0, every):
        model.zero_grad()
        calls.clear()
        model(**inputs).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for hook in hooks:
        hook.remove()
    assert len(calls) == 4 + len(range(0, 4, every))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@KINDS
def test_every_weight_gets_a_gradient(kind: type[Denoiser]) -> None:
    model = make(kind)
    model(**given(model)).square().sum().backward()
    # Nothing reads the text that leaves the last block, so nothing asks what it would attend to.
    without = [] if kind is CrossTransformer else ["blocks.3.text.q_norm.weight"]
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == without


@KINDS
@pytest.mark.parametrize("masked", [False, True])
def test_blocks_compile_as_a_whole(kind: type[Denoiser], masked: bool) -> None:
    """Without a break in the graph, which would be an error here."""
    model = make(kind, [Stage(2, "skiparse", 2), Stage(1, "skiparse_2d", 2), Stage(1)], **NO_SKIPS[kind])
    inputs = given(model)
    if masked:
        inputs |= {"text_mask": torch.tensor([[1, 1, 0, 0, 0], [1] * 5]), "video_mask": torch.ones(2, 3, 6, 10)}
        inputs["video_mask"][1, :, 4:] = 0
    expected = model(**inputs)
    torch._dynamo.reset()
    model.compile_blocks(fullgraph=True, dynamic=False, backend="eager")
    torch.testing.assert_close(model(**inputs), expected, rtol=0, atol=1e-5)
    torch._dynamo.reset()


@KINDS
@torch.no_grad()
def test_half_precision_keeps_close(kind: type[Denoiser]) -> None:
    model = make(kind)
    for parameter in model.parameters():
        parameter.mul_(0.3)
    inputs = given(model)
    exact = model(**inputs)
    half = model.to(torch.bfloat16)(**inputs)
    assert half.dtype == torch.float32
    assert (half - exact).norm() < 0.03 * exact.norm()


@KINDS
@torch.no_grad()
def test_a_new_model_predicts_zero_and_listens_to_no_text(kind: type[Denoiser]) -> None:
    model = kind(stages=SPARSE, **(CROSS if kind is CrossTransformer else JOINT))
    inputs = given(model)
    assert not model(**inputs).any()
    nn.init.normal_(model.out.weight)
    torch.testing.assert_close(model(**inputs), model(**(inputs | {"text": torch.randn(2, 5, 10)})))
    if kind is JointTransformer:  # its blocks pass on what they get
        out = model(**inputs)
        for block in model.blocks:
            nn.init.normal_(block.video.qkv.weight)
        assert torch.equal(model(**inputs), out)


DENSE = [Stage(4)]


@torch.no_grad()
def test_dense_to_sparse_starts_where_dense_was() -> None:
    dense = make(JointTransformer, DENSE, long_skips=False)
    with_skips = restage(dense, [Stage(1), Stage(2, "skiparse", 1), Stage(1)], long_skips=True)
    inputs = given(dense)
    torch.testing.assert_close(with_skips(**inputs), dense(**inputs), rtol=0, atol=1e-5)
    assert with_skips.blocks[0].video.qkv.weight.data_ptr() == dense.blocks[0].video.qkv.weight.data_ptr()

    sparse = restage(dense, SPARSE, long_skips=True)
    assert (sparse(**inputs) - dense(**inputs)).abs().max() > 1e-3
    back = restage(sparse, DENSE, long_skips=False)
    assert torch.equal(back(**inputs), dense(**inputs))


def test_what_a_restaged_model_keeps_of_the_other() -> None:
    model = make(JointTransformer).bfloat16().requires_grad_(False).eval()
    model.recompute_every = 1
    other = restage(model, DENSE, long_skips=False)
    assert not any(value.requires_grad for value in (*other.parameters(), *model.parameters()))
    assert other.recompute_every == 1
    assert not other.training
    back = restage(other, SPARSE, long_skips=True)
    assert {value.dtype for value in back.parameters()} == {torch.bfloat16}
    assert {name.split(".")[0] for name, value in back.named_parameters() if value.requires_grad} == {
        "video_skips",
        "text_skips",
    }


@torch.no_grad()
def test_long_skips_stay_where_they_lead_from_and_to() -> None:
    five = make(JointTransformer, [Stage(1)] * 5)
    inputs = given(five)
    assert torch.equal(restage(five, [Stage(1, "skiparse", 1)] * 5)(**inputs), five(**inputs))
    three = restage(five, [Stage(2), Stage(1), Stage(2)])
    assert torch.equal(three.video_skips[0].linear.weight, torch.eye(32, 64))


@torch.no_grad()
def test_a_model_gets_conditions_without_changing() -> None:
    model = make(CrossTransformer)
    conditioned = restage(model, frame_channels=[4, 2])
    inputs = given(model)
    more = inputs | {"latent": torch.cat((inputs["latent"], torch.randn(2, 6, 3, 6, 10)), dim=1)}
    torch.testing.assert_close(conditioned(**more), model(**inputs), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": [Stage(3)]}, "stages have 3 blocks, but the model has 4"),
        ({"heads": 4}, "would change out_table"),
        ({"foo": 1}, "has no setting foo; it has channels"),
    ],
)
def test_only_the_schedule_may_change(change: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        restage(make(CrossTransformer), **change)


WRONG: list[tuple[str, Callable[[dict], Any], str]] = [
    ("text", lambda i: i["text"][..., :3], r"text of shape 2 5 3 does not fit; it must be 2 L 10"),
    ("text", lambda i: i["text"][:1], r"text of shape 1 5 10 does not fit"),
    ("text", lambda i: i["text"][:, :0], r"text of shape 2 0 10 does not fit"),
    ("latent", lambda i: i["latent"][..., :-1], r"latent width 9 is no multiple of the patch size 2"),
    ("latent", lambda i: i["latent"][:, :, :, :-1], r"latent height 5 is no multiple of the patch size 2"),
    ("latent", lambda i: i["latent"][:, :2], r"latent of shape 2 2 3 6 10 does not fit; it must be B 4 T H W"),
    ("latent", lambda i: i["latent"][0], r"latent of shape 4 3 6 10 does not fit"),
    ("latent", lambda i: i["latent"][:, :, :0], r"latent of shape 2 4 0 6 10 does not fit"),
    ("latent", lambda i: i["latent"].long(), r"latent is of torch.int64; it must be of floating point"),
    ("time", lambda i: i["time"][:1], r"time of shape 1 does not fit; it must be 2"),
    ("text_mask", lambda _: torch.ones(2, 4), r"text_mask of shape 2 4 does not fit; it must be 2 5"),
    ("video_mask", lambda _: torch.ones(2, 3, 3, 5), r"video_mask of shape 2 3 3 5 does not fit; it must be 2 3 6 10"),
]


@KINDS
@pytest.mark.parametrize(("name", "wrong", "message"), WRONG)
def test_what_does_not_fit_is_refused_before_any_compute(
    kind: type[Denoiser], name: str, wrong: Callable[[dict], Any], message: str
) -> None:
    model = make(kind)
    model.patch.register_forward_pre_hook(lambda *_: pytest.fail("something was computed"))
    inputs = given(model)
    with pytest.raises(UsageError, match=message):
        model(**(inputs | {name: wrong(inputs)}))


def test_pooled_text_is_asked_for() -> None:
    model = make(JointTransformer)
    inputs = given(model)
    with pytest.raises(UsageError, match=r"pooled_text is missing; it must be 2 6"):
        model(**{key: value for key, value in inputs.items() if key != "pooled_text"})
    with pytest.raises(UsageError, match=r"pooled_text of shape 2 5 does not fit; it must be 2 6"):
        model(**(inputs | {"pooled_text": torch.ones(2, 5)}))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"blocks": 2, "pattern": "skiparse", "k": 0}], "k=0: must be a whole number of at least 1"),
        ([{"blocks": 2, "pattern": "dense", "k": 4}], "pattern=dense has no sparsity; k=4 must be left out"),
        ([{"blocks": 0}], "blocks=0: must be a whole number of at least 1"),
        ([{"blocks": 2, "pattern": "sparse"}], "pattern=sparse: is not known; choose dense, 2\\+1d, skiparse"),
        ([{"blocks": 2, "sparsity": 4}], "give blocks=N, pattern=NAME and k=N"),
        (["dense"], "give blocks=N, pattern=NAME and k=N"),
        ([], "at least one stage"),
    ],
)
def test_impossible_stages_are_refused(stages: list, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make(CrossTransformer, stages)


@KINDS
@pytest.mark.parametrize("name", ["text_mask", "video_mask"])
@pytest.mark.parametrize("value", [float("nan"), -1e4, 0.5])
def test_other_masks_than_of_ones_and_zeros_are_refused(kind: type[Denoiser], name: str, value: float) -> None:
    model = make(kind)
    mask = torch.zeros((2, 5) if name == "text_mask" else (2, 3, 6, 10))
    mask[0, 0] = value
    with pytest.raises(UsageError, match=f"{name} has values other than 1 .* and 0"):
        model(**given(model), **{name: mask})


@KINDS
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("heads", 0, "heads=0: must be a whole number"),
        ("heads", 2.5, "heads=2.5: must be a whole number"),
        ("patch_size", -2, "patch_size=-2: must be a whole number"),
        ("channels", True, "channels=true: must be a whole number"),
        ("text_channels", None, "text_channels=null: must be a whole number"),
        ("foo", 1, "has no setting foo; it has channels"),
        ("stages", 3, "stages=3: must be a list"),
        ("stages", "dense", "stages=dense: must be a list"),
        ("stages", [[1, 2]], r"stages: .* is none; give blocks=N"),
    ],
)
def test_impossible_settings_are_refused(kind: type[Denoiser], name: str, value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        kind(**((CROSS if kind is CrossTransformer else JOINT) | {name: value}))


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (CrossTransformer, "position_scale", [1, 1]),
        (CrossTransformer, "position_scale", [0, 1, 1]),
        (CrossTransformer, "position_scale", 2),
        (CrossTransformer, "frame_channels", [-1]),
        (CrossTransformer, "frame_channels", 3),
        (JointTransformer, "modulation_width", 7),
        (JointTransformer, "long_skips", "no"),
    ],
)
def test_impossible_settings_of_one_are_refused(kind: type[Denoiser], name: str, value: Any) -> None:
    with pytest.raises(
        UsageError, match=f"{name}=.*must be (three numbers|a list|true or false|a (whole )?number|even)"
    ):
        kind(**((CROSS if kind is CrossTransformer else JOINT) | {name: value}))


@pytest.mark.parametrize(("kind", "head_dim"), [(CrossTransformer, 10), (JointTransformer, 24)])
def test_heads_that_cannot_be_rotated_are_refused(kind: type[Denoiser], head_dim: int) -> None:
    with pytest.raises(UsageError, match=f"head_dim={head_dim}"):
        make(kind, head_dim=head_dim)


def test_tables_made_in_inference_mode_serve_training() -> None:
    rotary_tables.cache_clear()
    model = make(CrossTransformer)
    with torch.inference_mode():
        model(**given(model))
    model(**given(model)).sum().backward()
