"""The words that captions had in training."""

from osp.conditioning import SeenWords, unknown_words
from osp.conditioning.seen import MOST_WORDS


def test_words_of_prompts_that_no_caption_had_are_named_once_in_their_order() -> None:
    seen = SeenWords()
    seen.add(["a red ball", "", "a blue  ball\n"])
    assert seen.listed() == ["a", "ball", "blue", "red"]
    assert unknown_words(["a green ball", "Red green cube"], seen.listed() or ()) == ["green", "Red", "cube"]
    seen.add(["x" * 10_000])
    assert len(seen.listed() or ()) == 4
    again = SeenWords(seen.listed())
    again.add(["cube"])
    assert again.listed() == ["a", "ball", "blue", "cube", "red"]


def test_too_many_words_and_words_that_are_not_all_known_are_none() -> None:
    unknown, many = SeenWords(None), SeenWords()
    unknown.add(["a"])
    many.add([" ".join(map(str, range(MOST_WORDS)))])
    assert (unknown.listed(), len(many.listed() or ())) == (None, MOST_WORDS)
    many.add(["more"])
    many.add(["a"])
    assert many.listed() is None
