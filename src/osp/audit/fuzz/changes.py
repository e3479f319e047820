"""Random changes of bytes and of plain values, drawn from a generator, so that the same seed gives the same damage."""

import json
import math
from random import Random
from typing import Any

_WIDTHS = (1, 2, 4, 8)  # bytes of a number in a header
_MOST = 4  # changes of one file

DEEP = "[" * 3000 + "]" * 3000
HOSTILE_TEXTS = (
    *("", " ", "x", "\0", "a\nb", "\x1b[31mred", "‮right to left", "\ud800", "\ufeff", "é" * 300, "'\"\\"),
    *("<script>fuzz()</script>", "'><img src=x onerror=fuzz()>", "../../../etc/passwd", "/etc/passwd", "/dev/zero"),
    *("os.system", "file:///etc/passwd", "%s%n{0}${x}", "-1", "nan", "1e400", "w" * 70000),
)
HOSTILE_NUMBERS = (
    *(0, 1, -1, 2, 255, 2**31 - 1, 2**31, -(2**31), 2**53 + 1, 2**63, -(2**63), 2**64, 10**30, 10**400),
    *(0.5, -0.0, 1e-320, 1e308, math.nan, math.inf, -math.inf),
)
# Texts that `json` writes for no value.
_RAW = ("NaN", "-Infinity", "1e400", "-0", "1" * 6000, "[" * 100_000, '{"a":' * 2000, '"\\ud800"', "{", "[1,]", "tru")


def change_bytes(draw: Random, data: bytes) -> bytes:
    """The bytes with one to four changes: bits, numbers, runs that are gone, doubled, moved, or made up."""
    for _ in range(draw.randint(1, _MOST)):
        data = draw.choice(_BYTE_CHANGES)(draw, data)
    return data


def flip_bit(draw: Random, data: bytes) -> bytes:
    """The bytes with one other bit, anywhere."""
    if not data:
        return b"\1"
    at = draw.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << draw.randrange(8))]) + data[at + 1 :]


def change_value(draw: Random, value: Any) -> Any:
    """The plain value with one to three places changed; a place may hold anything then, or be gone."""
    value = json.loads(json.dumps(value))
    for _ in range(draw.randint(1, 3)):
        places = _places(value)
        if not places:
            return hostile_value(draw, value)
        holder, key = draw.choice(places)
        _change_place(draw, value, holder, key)
    return hostile_value(draw, value) if draw.random() < 0.02 else value


def hostile_value(draw: Random, whole: Any = None) -> Any:
    """Any value that JSON may hold: of another type, huge, deep, or another part of the same document."""
    kind = draw.randrange(8)
    if kind == 0:
        return draw.choice((None, True, False))
    if kind == 1:
        return draw.choice(HOSTILE_TEXTS)
    if kind in (2, 3):
        return draw.choice(HOSTILE_NUMBERS)
    if kind == 4:
        return draw.choice(([], {}, [[]], [None], {"": None}, [0] * 1000, {"a": {"a": {"a": 1}}}))
    if kind == 5:
        return {draw.choice(HOSTILE_TEXTS): hostile_value(draw), "x": hostile_value(draw)}
    if kind == 6:
        return [hostile_value(draw) for _ in range(draw.randint(1, 3))]
    places = _places(whole)
    if not places:
        return str(whole)
    holder, key = draw.choice(places)
    return json.loads(json.dumps(holder[key]))


def change_json(draw: Random, text: str) -> str:
    """A JSON text with other values in some places, or with something that is no JSON in one."""
    try:
        value = json.loads(text)
    except ValueError:
        return change_bytes(draw, text.encode("utf-8", "surrogatepass")).decode("utf-8", "surrogateescape")
    changed = json.dumps(change_value(draw, value), indent=draw.choice((None, 1)))
    if draw.random() < 0.15:
        digits = [at for at, character in enumerate(changed) if character.isdigit() or character == '"']
        at = draw.choice(digits) if digits else 0
        changed = changed[:at] + draw.choice(_RAW) + changed[at + draw.randint(0, 1) :]
    return changed


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(holder, key or index) of everything inside a value."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        holder = waiting.pop()
        keys = list(holder) if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ()
        for key in keys:
            found.append((holder, key))
            waiting.append(holder[key])
    return found


def _change_place(draw: Random, whole: Any, holder: Any, key: Any) -> None:
    kind = draw.randrange(10)
    old = holder[key]
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[draw.choice((*HOSTILE_TEXTS, *map(str, holder)))] = holder.pop(key)
    elif kind == 1:
        holder.insert(key, old)
    elif kind in (2, 3) and isinstance(old, int | float) and not isinstance(old, bool):
        holder[key] = draw.choice((old + 1, old - 1, -old, old * 1000, old // 3, str(old), [old], old * 2**40))
    elif kind == 2 and isinstance(old, str):
        holder[key] = draw.choice((old + draw.choice(HOSTILE_TEXTS), old[:-1], old.swapcase(), [old], "../" + old))
    else:
        holder[key] = hostile_value(draw, whole)


def _place(draw: Random, data: bytes) -> int:
    """A place in the data; headers, at both ends, come more often than their length would have them."""
    end = len(data)
    if not end:
        return 0
    kind = draw.random()
    if kind < 0.3:
        return draw.randrange(min(end, 128))
    if kind < 0.4:
        return draw.randrange(max(end - 512, 0), end)
    return draw.randrange(end)


def _flip(draw: Random, data: bytes) -> bytes:
    at = _place(draw, data)
    return data[:at] + bytes([byte ^ (1 << draw.randrange(8)) for byte in data[at : at + 1]]) + data[at + 1 :]


def _set(draw: Random, data: bytes) -> bytes:
    at = _place(draw, data)
    return data[:at] + bytes([draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))]) + data[at + 1 :]


def _number(draw: Random, data: bytes) -> bytes:
    at, width = _place(draw, data), draw.choice(_WIDTHS)
    largest = (1 << 8 * width) - 1
    small, near = draw.randint(0, 64), largest - draw.randint(0, 64)
    value = draw.choice((0, 1, largest, largest >> 1, (largest >> 1) + 1, len(data) & largest, small, near))
    return data[:at] + value.to_bytes(width, draw.choice(("little", "big"))) + data[at + width :]


def _cut(draw: Random, data: bytes) -> bytes:
    return data[: _place(draw, data)]


def _delete(draw: Random, data: bytes) -> bytes:
    at = _place(draw, data)
    return data[:at] + data[at + draw.choice((1, 2, 4, 8, 100, 1000)) :]


def _insert(draw: Random, data: bytes) -> bytes:
    at, length = _place(draw, data), draw.choice((1, 2, 4, 8, 100))
    return data[:at] + draw.choice((bytes(length), b"\xff" * length, draw.randbytes(length))) + data[at:]


def _double(draw: Random, data: bytes) -> bytes:
    at, length = _place(draw, data), draw.choice((1, 8, 100, 1000))
    return data[: at + length] + data[at:]


def _move(draw: Random, data: bytes) -> bytes:
    here, there, length = _place(draw, data), _place(draw, data), draw.choice((1, 8, 100, 1000))
    return data[:here] + data[there : there + length] + data[here + length :]


def _blank(draw: Random, data: bytes) -> bytes:
    at, length = _place(draw, data), draw.choice((4, 64, 1000))
    return data[:at] + bytes(len(data[at : at + length])) + data[at + length :]


_BYTE_CHANGES = (_flip, _flip, _set, _number, _number, _cut, _delete, _insert, _double, _move, _blank)
