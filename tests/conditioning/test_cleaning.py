"""The cleaning of captions and prompts, and what the text encoders do with it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from text_folders import save_clip, save_t5

from osp.audit.golden import Outcome, check
from osp.conditioning import CLIPPooled, Pair, T5Text, clean_texts
from osp.conditioning.cleaning import CLEANINGS
from osp.conditioning.plain_signs import plain_signs
from osp.errors import UsageError

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "text_clean"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_t5(tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Callable[..., T5Text]:
    return lambda **settings: T5Text(folder, dtype="float32", **settings)


def test_recorded_captions_are_cleaned_as_published() -> None:
    (outcome,) = check(GOLDEN)
    assert outcome.state == "passed"
    assert "worst of 60" in outcome.detail


def test_a_text_that_is_cleaned_otherwise_fails_with_its_name(tmp_path: Path) -> None:
    def outcome(pairs: list[dict[str, Any]]) -> Outcome:
        (tmp_path / "text_clean").mkdir(exist_ok=True)
        (tmp_path / "text_clean" / "a.json").write_text(json.dumps({"pairs": pairs}))
        (found,) = check(tmp_path)
        return found

    wrong = outcome([{"text": "A (cat)", "mt5": "a cat"}, {"text": "A dog", "mt5": "A dog"}])
    assert wrong.state == "failed"
    assert "mt5 of 'A dog': 'a dog'" in wrong.detail
    assert outcome([{"text": "A cat", "other": "a cat"}]).state == "not supported"
    assert outcome([]).detail == "nothing is recorded"


# As PixArt's filter with ftfy 6.3 and Beautiful Soup 4.15 gives them
@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("ＡＢＣ， ｱ！", "abc, ア!"),
        ("an oﬃce, ﬁsh and ǆ", "an office, fish and dž"),
        ("it‚s „low” ʼquoted‛", "it's \"low\" 'quoted"),
        ("bell\x07, mark\ufeff, red", "bell, mark, red"),
        ("donâ€™t â€œstopâ€¦", 'don†t "stop…'),
        ("cafe\u0301", "café"),
        ("a &lt;b&gt; &copy; &#8217;s &#39;x&#39; &foo; &bar &amp;quot;", "a <b> 's 'x' foo bar"),
        ("x<script>var y</script><style>z</style><!-- no --> <br/>w", "x w"),
        ("1 < 2 > 0", "1 < 2 > 0"),
        ("see 192.168.0.1 #12 #123456 #1234", "see 1234"),
        ("me@mail.com or Me@there", "me or me"),
        ("worldwide free shipping, download free, click on me", ","),
        ("jpeg images, png image, j2d1a2a, 12ab34", ", ,"),
        ("1920x1080, 3х4, 5×6, 7 x 8", ", , 7 x 8"),
        (r"line\nbreak . stop ...", "line break stop"),
        ("%E4%B8%80 a+b", "一 a b"),
    ],
)
def test_rules_beyond_the_recorded_captions(text: str, cleaned: str) -> None:
    assert CLEANINGS["once"](text) == cleaned


def test_cleanings_differ_in_their_number_and_in_the_signs_they_keep() -> None:
    assert clean_texts(["A &amp;amp;lt;b&gt; 猫"], "none") == ["A &amp;amp;lt;b&gt; 猫"]
    assert CLEANINGS["once"]("a , ,") == "a ,"
    assert CLEANINGS["twice"]("a , ,") == "a"
    assert CLEANINGS["twice"]("一只猫。 x") == "一只猫。 x"
    assert CLEANINGS["twice_no_cjk"]("一只猫。 x") == "。 x"
    with pytest.raises(UsageError, match="cleaning=thrice"):
        clean_texts([""], "thrice")


def test_surrogates_of_broken_captions_become_a_sign() -> None:
    assert plain_signs("\ud83d\ude00 \ud83d") == "\U0001f600 \ufffd"


def test_the_cleaning_of_captions_is_part_of_the_identity_and_that_of_prompts_is_not(
    encoder: Callable[..., T5Text], tmp_path: Path
) -> None:
    plain, made = encoder(), encoder(cleaning="twice")
    assert made.fingerprint() == f"{plain.fingerprint()} cleaned twice.1"
    assert encoder(prompt_cleaning="twice").fingerprint() == plain.fingerprint()
    pooled = CLIPPooled(save_clip(tmp_path / "clip"), dtype="float32")
    tokens, vector = Pair(plain, pooled, cleaning="once").identities()
    assert tokens is not None
    assert vector is not None
    assert (tokens.fingerprint, vector.fingerprint) == (
        f"{plain.fingerprint()} cleaned once.1",
        f"{pooled.fingerprint()} cleaned once.1",
    )
    assert Pair(plain, pooled).identities()[0] == plain.identities()[0]
    with pytest.raises(UsageError, match="t5: prompt_cleaning=never"):
        encoder(prompt_cleaning="never")


def test_without_a_cut_the_negative_prompt_is_as_it_is(encoder: Callable[..., T5Text]) -> None:
    text = encoder()
    asked, against = text.with_negative(["red", "a blue ring"], "none at all")
    alone = text(["none at all"])
    assert asked.text.shape == against.text.shape == (2, 12, 32)
    assert against.mask.tolist() == [[True] * 12] * 2
    torch.testing.assert_close(against.text, alone.text.expand(2, -1, -1), atol=1e-5, rtol=0)


def test_v1_0_and_v1_1_cut_the_negative_prompt_to_the_prompt_and_count_its_padding(
    encoder: Callable[..., T5Text],
) -> None:
    text = encoder(cut_to_prompt=True)
    asked, against = text.with_negative(["red", "a blue ring"], "bad")
    assert torch.equal(asked.mask, against.mask)
    assert asked.mask.sum(dim=1).tolist() == [4, 12]
    # As published: padded to the most tokens, run with its mask, then cut.
    filled = text.tokenizer(["bad"], padding="max_length", max_length=300, return_tensors="pt")
    published = text.model(**filled).last_hidden_state[0]
    torch.testing.assert_close(against.text[1], published[:12], atol=1e-5, rtol=0)
    torch.testing.assert_close(against.text[0, :4], published[:4], atol=1e-5, rtol=0)
    assert (published[4:12].abs().amax(dim=1) > 0.1).all()  # padding says something
    # A prompt is as if alone, also against one that is longer.
    alone, against_alone = text.with_negative(["red"], "bad and ugly")
    torch.testing.assert_close(alone.text[0], asked.text[0, :4], atol=1e-5, rtol=0)
    assert against_alone.text.shape == (1, 4, 32)
    assert against_alone.mask.all()
    longer = text(["bad and ugly"]).text[:, :4]
    torch.testing.assert_close(against_alone.text, longer, atol=1e-5, rtol=0)
