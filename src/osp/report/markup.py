"""HTML of which every part is escaped: only what was made here counts as HTML already."""

from html import escape

_VOID = {"img": ">", "br": ">", "line": "/>", "polyline": "/>"}  # elements without an end, and how each is closed


class Html(str):
    """Text that is HTML already; anything else, of whatever type, is escaped where it becomes a part of an element."""

    __slots__ = ()


def tag(name: str, *inside: object, **attributes: object) -> Html:
    """An element with what is inside it. An attribute that is True has no value; names are as in `class_`, `data_x`."""
    said = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(str(value))}"')
        for key, value in attributes.items()
    )
    return Html(f"<{name}{said}{_VOID[name]}" if name in _VOID else f"<{name}{said}>{joined(*inside)}</{name}>")


def joined(*parts: object, between: str = "") -> Html:
    """Parts one after another; those that are no HTML are escaped."""
    return Html(between.join(part if isinstance(part, Html) else escape(str(part)) for part in parts))
