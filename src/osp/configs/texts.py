"""Texts in overrides: how Hydra and OmegaConf read back exactly what stands there, and how a list of them is cut."""

import re
from collections.abc import Sequence

QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
_PLAIN = re.compile(r"(?:\.{0,2}/)?[A-Za-z_][\w./-]*", re.ASCII)
_WORDS = ("null", "true", "false", "inf", "nan")  # what Hydra takes for no text


def quoted(value: object) -> str:
    """A value as Hydra and OmegaConf read it back as a text, whatever characters it has."""
    text = str(value)
    if _PLAIN.fullmatch(text) and text.lower() not in _WORDS:
        return text
    return in_quotes(text)


def in_quotes(text: str) -> str:
    """A text in the quotes of an override."""
    # A backslash in quotes stands for itself, except before a quote and at the end.
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), escaped(text)) + "'"


def escaped(text: str) -> str:
    """A text as a value of a configuration, in which `${` refers to nothing."""
    return re.sub(r"(\\*)\$\{", lambda found: f"{found[1] * 2}\\${{", text)


def cut(text: str, at: str = ",") -> list[str]:
    """The parts of a text between separators that stand in no quotes and no brackets."""
    parts, start, depth, position = [], 0, 0, 0
    while position < len(text):
        character = text[position]
        if character in "'\"" and (found := QUOTED.match(text, position)):
            position = found.end()
            continue
        depth += (character in "[{(") - (character in "]})")
        if character == at and depth <= 0:
            parts.append(text[start:position])
            start = position + 1
        position += 1
    return [*parts, text[start:]]


def with_quoted_conditions(overrides: Sequence[str]) -> list[str]:
    """The overrides with conditions on clips (`where`) in quotes, unless they are null or in quotes already."""
    prepared = []
    for override in overrides:
        key, equals, value = override.partition("=")
        is_bare = key.lstrip("+").rpartition(".")[2] == "where" and value.strip() != "null"
        if equals and is_bare and not all(QUOTED.fullmatch(one.strip()) for one in cut(value)):
            override = f"{key}={in_quotes(value)}"
        prepared.append(override)
    return prepared
