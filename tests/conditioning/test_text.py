"""Encoded prompts, the encoder that is trained along, and text dropout."""

import logging

import pytest
import torch
import torch.nn.functional as F

from osp.conditioning import EncodedText, WordText, draw_dropped, drop_prompts
from osp.conditioning.words import WORD_BYTES
from osp.data.procedural.scene import COLOURS, MOTIONS, SHAPES, caption, scene_for
from osp.denoiser import CrossTransformer, JointTransformer, Stage
from osp.errors import UsageError

PROMPTS = ["a red ring grows", "", "on a grey background, a small blue star moves to the left"]


def small(**settings: object) -> WordText:
    torch.manual_seed(0)
    return WordText(**({"channels": 32, "pooled_channels": 24, "layers": 2, "max_tokens": 16} | settings))


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1000 * seed + i) for i in range(count)]


def equal(a: EncodedText, b: EncodedText, tolerance: float = 1e-6) -> None:
    assert torch.equal(a.mask, b.mask)
    torch.testing.assert_close(a.text, b.text, atol=tolerance, rtol=0)
    assert (a.pooled is None) == (b.pooled is None)
    if a.pooled is not None:
        torch.testing.assert_close(a.pooled, b.pooled, atol=tolerance, rtol=0)


def test_a_prompt_is_a_token_for_each_word_and_one_for_the_end() -> None:
    encoded = small()(PROMPTS)
    assert encoded.text.shape == (3, 13, 32)
    assert encoded.mask.dtype == torch.bool
    assert encoded.mask.sum(dim=1).tolist() == [5, 1, 13]
    assert encoded.pooled is not None
    assert encoded.pooled.shape == (3, 24)
    assert small().count_tokens([*PROMPTS, "x" * WORD_BYTES, "x" * (WORD_BYTES + 1), "  "]) == [5, 1, 13, 2, 3, 1]
    assert small(pooled_channels=None)(PROMPTS).pooled is None
    assert len(small()([])) == 0


def test_padding_and_company_change_nothing() -> None:
    encoder = small()
    together = encoder(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        equal(encoder([prompt]), together[i : i + 1], 1e-5)
    assert (together.text[~together.mask] == 0).all()


def test_places_of_words_and_of_bytes_matter() -> None:
    encoder = small()
    left, right, other = encoder(["from left to right", "from right to left", "from tfel to right"]).text
    assert (left - right).abs().amax(dim=1).min() > 1e-3
    assert (left - other).abs().amax(dim=1).min() > 1e-3


def test_any_text_can_be_read() -> None:
    encoded = small()(["一个红色的圆圈向左移动", "emoji 🎈", "half \ud800 a pair", "tab\tand\nline"])
    assert torch.isfinite(encoded.text).all()
    assert encoded.mask.sum(dim=1).tolist() == [4, 3, 5, 4]


def test_the_same_weights_give_the_same() -> None:
    encoder = small()
    again = small()
    equal(encoder(PROMPTS), again(PROMPTS), 0)
    equal(encoder.eval()(PROMPTS), again.train()(PROMPTS), 0)
    assert encoder.fingerprint() == again.fingerprint()
    with torch.no_grad():
        again.norm.weight[0] += 1
    assert encoder.fingerprint() != again.fingerprint()
    assert encoder.fingerprint() != small(heads=2).fingerprint()


def test_gradients_reach_every_part() -> None:
    encoder = small()
    encoded = encoder(PROMPTS)
    assert encoded.pooled is not None
    (encoded.text.square().sum() + encoded.pooled.square().sum()).backward()
    for name, value in encoder.named_parameters():
        assert value.grad is not None, name
        assert value.grad.abs().sum() > 0, name
    assert (encoder.spelling.weight.grad[0] == 0).all()


@pytest.mark.parametrize("kind", ["cross", "joint"])
def test_denoisers_take_the_text_and_teach_its_encoder(kind: str) -> None:
    torch.manual_seed(0)
    shape = {"channels": 4, "out_channels": 4, "heads": 2, "text_channels": 32, "stages": [Stage(2)]}
    model = (
        CrossTransformer(head_dim=12, **shape)
        if kind == "cross"
        else JointTransformer(head_dim=16, pooled_channels=24, modulation_width=32, **shape)
    )
    for value in model.parameters():
        torch.nn.init.normal_(value, std=0.1)
    encoder = small()
    encoded = encoder(PROMPTS)
    latent, time = torch.randn(3, 4, 2, 4, 4), torch.tensor([1.0, 500.0, 900.0])
    out = model(latent, time, encoded.text, encoded.mask, encoded.pooled)
    more = encoded.padded(20)
    torch.testing.assert_close(model(latent, time, more.text, more.mask, more.pooled), out, atol=1e-5, rtol=0)
    out.square().mean().backward()
    assert encoder.spelling.weight.grad is not None
    assert encoder.spelling.weight.grad.abs().sum() > 0


def test_too_long_prompts(caplog: pytest.LogCaptureFixture) -> None:
    encoder = small(max_tokens=4)
    with pytest.raises(UsageError, match=r"the prompt 'one two three four' has 5 tokens, and words reads 4; shorten"):
        encoder(["short", "one two three four"], strict=True)
    assert len(encoder(["one two three"], strict=True).text[0]) == 4
    with caplog.at_level(logging.WARNING):
        cut = encoder(["one two three four", "one two three four five"])
        encoder(["one two three four five"])
    assert len(caplog.records) == 1
    assert "said once" in caplog.text
    equal(cut, encoder(["one two three"] * 2), 1e-6)


@pytest.mark.parametrize(
    "settings", [{"channels": 30}, {"layers": 0}, {"heads": 0}, {"max_tokens": 1}, {"channels": 0}]
)
def test_impossible_settings(settings: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        small(**settings)


def test_captions_fit_the_default() -> None:
    captions = [caption(scene_for(0, i)) for i in range(2000)]
    assert max(small().count_tokens(captions)) < WordText().max_tokens


def test_it_soon_tells_captions_apart() -> None:
    torch.manual_seed(0)
    encoder = WordText(channels=64, pooled_channels=64, layers=1)
    words = [SHAPES, COLOURS, MOTIONS]
    head = torch.nn.Linear(64, sum(map(len, words)))
    optimiser = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=3e-3)

    def batch(seed: int, start: int, count: int) -> tuple[list[str], torch.Tensor]:
        scenes = [scene_for(seed, i, objects=1) for i in range(start, start + count)]
        truth = [
            [SHAPES.index(o.shape), COLOURS.index(o.colour), MOTIONS.index(o.motion)]
            for (o,) in (s.objects for s in scenes)
        ]
        return [caption(scene) for scene in scenes], torch.tensor(truth)

    for step in range(100):
        prompts, truth = batch(0, 32 * step, 32)
        parts = head(encoder(prompts).pooled).split([*map(len, words)], dim=1)
        loss = sum(F.cross_entropy(part, truth[:, i]) for i, part in enumerate(parts))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    prompts, truth = batch(1, 0, 200)
    parts = head(encoder(prompts).pooled).split([*map(len, words)], dim=1)
    right = [(part.argmax(dim=1) == truth[:, i]).float().mean().item() for i, part in enumerate(parts)]
    assert min(right) > 0.9, right


def test_parts_of_a_batch() -> None:
    encoded = small()(PROMPTS)
    first = encoded[:2]
    assert first.text.shape == (2, 5, 32)
    equal(encoded[torch.tensor([0, 1])], first, 0)
    assert encoded.to(dtype=torch.bfloat16).text.dtype == torch.bfloat16
    assert encoded.to(dtype=torch.bfloat16).mask.dtype == torch.bool


def test_dropped_text_is_the_empty_prompts() -> None:
    encoder = small()
    encoded, empty = encoder(PROMPTS), encoder([""])
    dropped = torch.tensor([True, False, False])
    equal(encoded.replaced(dropped, empty), encoder(["", *PROMPTS[1:]]).padded(13), 1e-5)
    assert drop_prompts(PROMPTS, dropped) == ["", *PROMPTS[1:]]
    equal(encoder([""]).replaced(torch.tensor([False]), encoder(PROMPTS[:1]))[:], encoder([""]), 1e-6)


def test_dropout_is_drawn_for_each_sample_by_itself() -> None:
    drawn = draw_dropped(0.1, generators(4000))
    assert drawn.dtype == torch.bool
    assert 0.085 < drawn.float().mean() < 0.115
    assert torch.equal(drawn[7:9], draw_dropped(0.1, generators(9)[7:]))
    assert not draw_dropped(0.0, generators(100)).any()
    assert draw_dropped(1.0, generators(100)).all()
    with pytest.raises(UsageError, match=r"text_dropout=1\.5: must lie"):
        draw_dropped(1.5, generators(1))
