"""The words that captions had in training, by which a prompt's words that no caption had are found."""

from collections.abc import Collection, Iterable, Sequence

MOST_WORDS = 4000
"""Of the words that are kept; where captions have more, none are kept, as hardly a word is missing among so many."""

_LONGEST = 64  # characters of a word; longer ones are no words


class SeenWords:
    """The words of the captions that were added, as they are spelled; None once they are too many or not all known.

    Args:
        words: those of before, where a run goes on; None: they are not known, and stay so.
    """

    def __init__(self, words: Iterable[str] | None = ()) -> None:
        self._words = None if words is None else set(words)

    def add(self, captions: Sequence[str]) -> None:
        """Keep the words of some captions."""
        if self._words is None:
            return
        self._words.update(*map(_words, captions))
        if len(self._words) > MOST_WORDS:
            self._words = None

    def listed(self) -> list[str] | None:
        """All of them in order, or None."""
        return None if self._words is None else sorted(self._words)


def unknown_words(prompts: Iterable[str], known: Collection[str]) -> list[str]:
    """The words of prompts that are not known, each once, in the order in which they come."""
    return [word for word in dict.fromkeys(word for prompt in prompts for word in _words(prompt)) if word not in known]


def _words(text: str) -> list[str]:
    return [word for word in text.split() if len(word) <= _LONGEST]
