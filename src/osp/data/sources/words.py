"""Scores as words: a sentence on how a clip looks, before or after its caption, as the training of v1.3 adds it.

The published code has ten sentences each for good and poor videos and images, draws one, and puts it before or after
the caption. These are ours, in that form; with one of them in a prompt, a model so trained is asked for such a look.
"""

from collections.abc import Mapping
from itertools import product
from typing import Any

import torch

HIGH, LOW = 5.75, 4.25
"""A score from HIGH on is called high, up to LOW it is called low; others get no words."""

SCORES = ("aesthetic", "aes")
"""The scores that count, the first that a record has."""

_FORMS = (
    "This {} has a {} aesthetic quality.",
    "The aesthetic quality of this {} is {}.",
    "This {} is of {} aesthetic quality.",
    "The {} has {} aesthetics.",
    "In this {} the aesthetic quality is {}.",
)
_WORDS = {"high": ("high", "very good"), "low": ("low", "poor")}

SENTENCES: Mapping[tuple[str, str], tuple[str, ...]] = {
    (kind, level): tuple(form.format(kind, word) for form, word in product(_FORMS, _WORDS[level]))
    for kind, level in product(("video", "image"), _WORDS)
}
"""Ten sentences for each kind (`video`, `image`) and level (`high`, `low`)."""


def with_aesthetic_words(caption: str, record: Mapping[str, Any], generator: torch.Generator) -> str:
    """The caption with a sentence on the clip's aesthetic score, which the generator draws, before or after it.

    A caption stays as it is where the record has no such score, or one between `LOW` and `HIGH`, and where it is empty:
    a clip without a caption is not described by its look alone.
    """
    scores: Mapping[str, float] = record.get("scores") or {}
    score = next((scores[name] for name in SCORES if name in scores), None)
    if score is None or LOW < score < HIGH or not caption:
        return caption
    kind = "image" if record.get("kind") == "image" else "video"
    choices = SENTENCES[kind, "high" if score >= HIGH else "low"]
    sentence = choices[int(torch.randint(len(choices), (), generator=generator))]
    before = bool(torch.rand((), generator=generator) < 0.5)
    return f"{sentence} {caption}" if before else f"{caption} {sentence}"
