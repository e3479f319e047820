"""Small files that people and other programs write, read with guards: kind of file, size, encoding, depth and types.

Captions, prompts, listings, indices, records and configurations all come through here, so that none of them can block,
fill the memory or end in a traceback. Every refusal is a DocumentError of one line, "FILE: reason" or
"FILE:LINE: reason".
"""

import csv
import io
import json
import math
import os
import re
import stat
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import yaml

from osp.errors import DataError

MIB = 1 << 20

COUNT = range(1 << 62)
"""The form of a whole number that counts something."""
SIZE = range(1, 1 << 62)
"""The form of a whole number that something has at least one of."""

_DEEPEST = 64  # levels of lists and mappings; what we write has fewer than ten
_LONGEST_NUMBER = 400  # digits: any float, and far more than any whole number that counts something
_SHOWN = 60  # characters of a wrong value in an error
_INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")  # control, format (right to left marks), surrogates, ...
_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_MARKS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))


class DocumentError(DataError):
    """A small file that cannot be read, is too large, or holds something else than it should."""


def printable(text: object) -> str:
    """The text with everything escaped that a terminal or a log would not show as a character of the line."""
    shown = str(text)
    if shown.isascii() and shown.isprintable():
        return shown
    return "".join(_escaped(character) for character in shown)


def read_text(path: Path, most: int = 64 * MIB) -> str:
    """The text of a regular file of at most `most` bytes; UTF-8 or UTF-16, a byte order mark is taken away.

    Raises FileNotFoundError if there is none, and DocumentError for anything else that cannot be read.
    """
    return decode_text(read_bytes(path, most), str(path))


def decode_text(data: bytes, place: str) -> str:
    """The text of bytes that are UTF-8, or UTF-16 with a byte order mark; the mark is taken away.

    Raises DocumentError naming `place` and the first byte that is neither.
    """
    mark, encoding = next(((mark, name) for mark, name in _MARKS if data.startswith(mark)), (b"", "utf-8"))
    try:
        return data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        at = error.start + len(mark)
        raise DocumentError(f"{place}: is not {encoding[:6].upper()} text (byte {at}); save it as UTF-8") from None


def parse_json(text: str | bytes, place: str, form: Any = Any) -> Any:
    """The value of a JSON text.

    Raises DocumentError naming `place` for a text that is no JSON, is too deep, or is not of the form (`check_form`).
    NaN and infinity, which JSON does not have, are refused like any other word.
    """
    if isinstance(text, bytes):
        text = decode_text(text, place)
    try:
        _check_depth(text)
        value = json.loads(text, parse_constant=_no_constant, parse_int=_whole, parse_float=_real)
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"{place}: is no JSON ({_reason(error)})") from None
    check_form(value, form, place)
    return value


def read_json(path: Path, form: Any = Any, most: int = 64 * MIB) -> Any:
    """The value of a JSON file. Raises as `read_text` and `parse_json`."""
    return parse_json(read_text(path, most), str(path), form)


def json_lines(path: Path, form: Any = Any, most: int = 4096 * MIB) -> Iterator[tuple[str, Any]]:
    """("FILE:LINE", value) of each line of a JSONL file that is not empty. Raises as `read_json`, naming the line."""
    for number, line in enumerate(_lines(read_text(path, most)), 1):
        if line.strip():
            place = f"{path}:{number}"
            yield place, parse_json(line, place, form)


def csv_rows(path: Path, most: int = 4096 * MIB) -> Iterator[tuple[str, dict[str, str]]]:
    """("FILE:LINE", row by column) of a CSV file whose first row names the columns; empty rows are passed over.

    Raises as `read_text`, and DocumentError naming the line for a row with more or fewer fields than there are columns,
    and for columns that have the same name.
    """
    reader = csv.reader(io.StringIO(read_text(path, most), newline=""), strict=True)
    columns: list[str] | None = None
    try:
        for row in reader:
            place = f"{path}:{reader.line_num}"
            if not row:
                continue
            if columns is None:
                columns = [name.strip() for name in row]
                if len({*columns}) < len(columns):
                    named = printable(", ".join(columns)[:_SHOWN])
                    raise DocumentError(f"{place}: two columns have the same name ({named})")
            elif len(row) != len(columns):
                raise DocumentError(
                    f"{place}: has {len(row)} fields where the header has {len(columns)}; "
                    'put text with commas into quotes: "a dog, brown"'
                )
            else:
                yield place, dict(zip(columns, row, strict=True))
    except csv.Error as error:
        raise DocumentError(f"{path}:{reader.line_num}: is no CSV ({error})") from None


def read_yaml(path: Path, form: Any = Any, most: int = 4 * MIB) -> Any:
    """The value of a YAML file of plain values. Raises as `read_text`, and DocumentError naming file and line."""
    return parse_yaml(read_text(path, most), str(path), form)


def parse_yaml(text: str, place: str, form: Any = Any) -> Any:
    """The value of a YAML text of plain values; aliases are refused, since few lines of them stand for gigabytes.

    Raises DocumentError naming `place` and the line.
    """
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST or isinstance(event, yaml.AliasEvent):
                what = "is an alias" if isinstance(event, yaml.AliasEvent) else f"has more than {_DEEPEST} levels"
                raise DocumentError(f"{place}:{event.start_mark.line + 1}: {what}, which is not read")
        value = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise DocumentError(f"{place}{line}: is no YAML ({error.problem or error.context})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise DocumentError(f"{place}: is no YAML ({_reason(error)})") from None
    check_form(value, form, place)
    return value


def check_form(value: Any, form: Any, place: str) -> None:
    """Raise DocumentError unless a plain value is of a declared form; the error names the place inside the value.

    A form is `Any`; a type (`float` takes whole numbers too; `float` and `int` are finite and no bool); a `range` of
    whole numbers; None; a tuple of alternatives; `[form]`, a list; or a mapping from keys to forms, in which "key?" may
    be missing and `...` stands for the form of all other keys. Without `...` other keys may hold anything.
    """
    if wrong := _wrong(value, form, ""):
        where, what = wrong
        raise DocumentError(f"{place}: {where.lstrip('.')}{': ' if where else ''}{what}")


def _wrong(value: Any, form: Any, where: str) -> tuple[str, str] | None:
    """The place inside a value, and what is wrong there; None if it is of the form."""
    if isinstance(form, Mapping):
        return _wrong_mapping(value, form, where)
    if isinstance(form, list):
        if not isinstance(value, list):
            return where, f"must be a list, is {_shown(value)}"
        found = (_wrong(item, form[0], f"{where}[{index}]") for index, item in enumerate(value))
        return next((one for one in found if one), None)
    if isinstance(form, tuple):
        wrong = [_wrong(value, one, where) for one in form]
        if not all(wrong):
            return None
        deeper = [one for one in wrong if one and one[0] != where]
        return deeper[0] if len(deeper) == 1 else (where, f"must be {_named(form)}, is {_shown(value)}")
    return None if _is(value, form) else (where, f"must be {_named(form)}, is {_shown(value)}")


def _wrong_mapping(value: Any, form: Mapping[Any, Any], where: str) -> tuple[str, str] | None:
    if not isinstance(value, dict):
        return where, f"must be a mapping, is {_shown(value)}"
    known = {}
    for key, inner in form.items():
        if key is ...:
            continue
        name = key.removesuffix("?")
        known[name] = inner
        if name not in value and not key.endswith("?"):
            return where, f"has no {name}"
    for key, item in value.items():
        if key in known or ... in form:
            shown = printable(str(key)[:_SHOWN])
            if wrong := _wrong(item, known.get(key, form.get(...)), f"{where}.{shown}"):
                return wrong
    return None


def _is(value: Any, form: Any) -> bool:
    if form is Any:
        return True
    if form is None:
        return value is None
    if isinstance(form, range):
        return _is(value, int) and value in form
    if form in (int, float):
        is_number = isinstance(value, int if form is int else int | float) and not isinstance(value, bool)
        return is_number and (isinstance(value, int) or math.isfinite(value))
    return isinstance(value, form)


_NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "a mapping",
    list: "a list",
}


def _named(form: Any) -> str:
    if isinstance(form, tuple):
        return " or ".join(map(_named, form))
    if isinstance(form, Mapping | list):
        return "a mapping" if isinstance(form, Mapping) else "a list"
    if isinstance(form, range):
        return f"a whole number of at least {form.start}"
    return "null" if form is None else _NAMES.get(form, getattr(form, "__name__", str(form)))


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return f"a {'mapping' if isinstance(value, dict) else 'list'} of {len(value)}"
    text = json.dumps(value) if isinstance(value, str | None | bool) else str(value)
    return printable(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


def read_bytes(path: Path, most: int) -> bytes:
    """The bytes of a regular file. Raises FileNotFoundError if there is none, DocumentError if it cannot be read."""
    try:
        # Without waiting: a FIFO that nobody writes to would block for ever.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise DocumentError(f"{path}: is no regular file")
            data = _at_most(file, most + 1) if status.st_size <= most else None
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DocumentError(f"{path}: cannot be read ({error.strerror})") from error
    if data is None or len(data) > most:
        size = f"{most // MIB} MiB" if most >= MIB else f"{most} bytes"
        raise DocumentError(f"{path}: is larger than {size}, which is more than such a file may hold")
    return data


def _at_most(file: BinaryIO, most: int) -> bytes:
    """The first bytes of a file; memory for `most` of them is taken only if there are so many."""
    parts, left = [], most
    while left > 0 and (part := file.read(min(left, MIB))):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _lines(text: str) -> list[str]:
    """The lines of a text; other separators than a line feed may stand inside a JSON string."""
    return [line.removesuffix("\r") for line in text.split("\n")]


_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)


def _check_depth(text: str) -> None:
    """Raise ValueError for JSON that is deeper than a parser may be asked to go."""
    if text.count("[") + text.count("{") <= _DEEPEST:
        return
    depth = 0
    for match in _BRACKETS.finditer(text):
        first = match[0][0]
        depth += (first in "[{") - (first in "]}")
        if depth > _DEEPEST:
            raise ValueError(f"more than {_DEEPEST} levels")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _whole(digits: str) -> int:
    if len(digits) > _LONGEST_NUMBER:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _real(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits[:_SHOWN]} is too large a number")
    return value


def _reason(error: Exception) -> str:
    return "too deep" if isinstance(error, RecursionError) else printable(" ".join(str(error).split()))[:200]


def _escaped(character: str) -> str:
    if unicodedata.category(character) not in _INVISIBLE:
        return character
    code = ord(character)
    return _ESCAPES.get(character) or (
        f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
    )
