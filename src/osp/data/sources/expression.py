"""A small language of conditions on named values: `aesthetic >= 4.75 and kind in ["video"]`. Nothing is executed.

    condition  = and-list { "or" and-list };  and-list = negation { "and" negation };  negation = "not" negation | test
    test       = sum { comparison sum } | sum ["not"] "in" "[" value { "," value } "]"
    comparison = "<" | "<=" | ">" | ">=" | "==" | "!=";  a chain, 1 < x < 2, holds if each of its links does
    sum        = product { ("+" | "-") product };  product = sign { ("*" | "/") sign };  sign = "-" sign | atom
    atom       = number | text in quotes | name | `any name` | "has" "(" name ")" | "(" condition ")"

A value may be missing. What needs it is then unknown, unless the rest decides: `False and unknown` is false, `True or
unknown` is true. Division by 0 has no value.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from osp.documents import printable
from osp.errors import UsageError

Value = float | str | bool | None
Values = Mapping[str, float | str]

_LONGEST = 4096  # characters
_DEEPEST = 50  # levels of brackets, signs and negations
_TOKEN = re.compile(
    r"""\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)
    |(?P<text>"[^"]*"|'[^']*')
    |(?P<name>[A-Za-z_][A-Za-z0-9_.]*|`[^`]+`)
    |(?P<sign><=|>=|==|!=|[<>()\[\],+*/-]))""",
    re.VERBOSE | re.ASCII,
)
_WORDS = ("and", "or", "not", "in", "has")
_COMPARISONS: Mapping[str, Callable[[Any, Any], bool]] = {
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
}


class _Token(NamedTuple):
    kind: str  # number, text, name, sign, word, end
    text: str
    at: int


@dataclass(frozen=True)
class _Node:
    """A part of an expression: what it is (`number`, `text` or `condition`), and how its value is found."""

    kind: str
    value: Callable[[Values], Value]


@dataclass(frozen=True)
class Expression:
    """A condition that has been read.

    Attributes:
        names: the names in it, in their order.
    """

    text: str
    names: tuple[str, ...]
    _node: _Node

    def __call__(self, values: Values) -> bool | None:
        """Whether the condition holds of these values; None where that needs one that is missing."""
        value = self._node.value(values)
        return value if isinstance(value, bool) else None


def parse(text: str, kinds: Mapping[str, str], key: str = "where") -> Expression:
    """The condition that a text states, over names of these kinds (`number` or `text`).

    Raises UsageError, naming the key and the place in the text, for one that is too long or too deep, is no condition,
    compares a number with a text, or has a name that is not among `kinds`; the known ones are listed then.
    """
    if len(text) > _LONGEST:
        raise UsageError(f"{key}: has {len(text)} characters; a condition may have {_LONGEST}")
    parser = _Parser(text, kinds, key)
    node = parser.whole()
    return Expression(text, tuple(parser.names), node)


class _Parser:
    """Reads one text from left to right; each method gives the node of what it is named after."""

    def __init__(self, text: str, kinds: Mapping[str, str], key: str) -> None:
        self.text, self.kinds, self.key = text, kinds, key
        self.names: dict[str, None] = {}
        self._depth = 0
        self._tokens = self._split()
        self._next = next(self._tokens)

    def whole(self) -> _Node:
        node = self._condition()
        if self._next.kind != "end":
            self._refuse(f"expected the end or `and`, `or`, a comparison, found {self._shown()}")
        return self._of_kind(node, "condition", 0)

    # --- tokens -------------------------------------------------------------------------------------------------------

    def _split(self) -> Iterator[_Token]:
        at, end = 0, len(self.text.rstrip())
        while at < end:
            found = _TOKEN.match(self.text, at)
            if found is None:
                at += len(self.text[at:]) - len(self.text[at:].lstrip())
                self._refuse(f"{printable(self.text[at])!r} makes no sense there", at)
            kind = str(found.lastgroup)
            word = found[kind]
            yield _Token("word" if word in _WORDS else kind, word, found.start(kind))
            at = found.end()
        yield _Token("end", "", end)

    def _take(self, *texts: str) -> _Token | None:
        """The next token if it is one of these signs or words; it is passed then."""
        token = self._next
        if token.kind not in ("sign", "word") or token.text not in texts:
            return None
        self._pass()
        return token

    def _pass(self) -> None:
        self._next = next(self._tokens, _Token("end", "", len(self.text)))

    def _expect(self, text: str) -> None:
        if self._take(text) is None:
            self._refuse(f"expected {text!r}, found {self._shown()}")

    def _shown(self) -> str:
        return "the end" if self._next.kind == "end" else printable(self._next.text[:40])

    def _refuse(self, reason: str, at: int | None = None) -> NoReturn:
        at = self._next.at if at is None else at
        near = printable(self.text[max(0, at - 20) : at + 20].strip())
        raise UsageError(f"{self.key}: {reason} (character {at + 1}, near {near!r})")

    def _of_kind(self, node: _Node, kind: str, at: int) -> _Node:
        if node.kind != kind:
            named = {"condition": "a condition such as aesthetic >= 4.75", "number": "a number", "text": "a text"}
            self._refuse(f"expected {named[kind]}, found {named[node.kind].partition(' such')[0]}", at)
        return node

    # --- grammar ------------------------------------------------------------------------------------------------------

    def _condition(self) -> _Node:
        return self._joined("or", lambda: self._joined("and", self._negation))

    def _joined(self, word: str, part: Callable[[], _Node]) -> _Node:
        at, parts = self._next.at, [part()]
        while self._take(word):
            parts = [self._of_kind(parts[0], "condition", at), *parts[1:]]
            at = self._next.at
            parts.append(self._of_kind(part(), "condition", at))
        return parts[0] if len(parts) == 1 else _Node("condition", _all_of(parts, decides=word == "or"))

    def _negation(self) -> _Node:
        if not self._take("not"):
            return self._test()
        at = self._next.at
        node = self._of_kind(self._deeper(self._negation), "condition", at)
        return _Node("condition", lambda values: _negated(node.value(values)))

    def _test(self) -> _Node:
        at, first = self._next.at, self._sum()
        negated = bool(self._take("not"))
        if negated or (self._next.kind == "word" and self._next.text == "in"):
            self._expect("in")
            return self._membership(self._no_condition(first, at), negated)
        links: list[tuple[str, _Node]] = []
        while sign := self._take(*_COMPARISONS):
            self._no_condition(first, at)
            there = self._next.at
            links.append((sign.text, self._of_kind(self._sum(), first.kind, there)))
        return first if not links else _Node("condition", _chained(first, links))

    def _no_condition(self, node: _Node, at: int) -> _Node:
        if node.kind == "condition":
            self._refuse("a condition cannot be compared", at)
        return node

    def _membership(self, node: _Node, negated: bool) -> _Node:
        self._expect("[")
        members = []
        while True:
            at = self._next.at
            members.append(self._of_kind(self._sum(), node.kind, at))
            if not self._take(","):
                break
        self._expect("]")

        def value(values: Values) -> Value:
            mine, others = node.value(values), [member.value(values) for member in members]
            if mine is None:
                return None
            found = True if mine in others else None if None in others else False
            return _negated(found) if negated else found

        return _Node("condition", value)

    def _sum(self) -> _Node:
        return self._calculated(("+", "-"), lambda: self._calculated(("*", "/"), self._sign))

    def _calculated(self, signs: Sequence[str], part: Callable[[], _Node]) -> _Node:
        at, node = self._next.at, part()
        steps: list[tuple[str, _Node]] = []
        while sign := self._take(*signs):
            self._of_kind(node, "number", at)
            there = self._next.at
            steps.append((sign.text, self._of_kind(part(), "number", there)))
        return node if not steps else _Node("number", _result_of(node, steps))

    def _sign(self) -> _Node:
        if not self._take("-"):
            return self._atom()
        at = self._next.at
        node = self._of_kind(self._deeper(self._sign), "number", at)
        return _Node("number", lambda values: None if (found := _number(node, values)) is None else -found)

    def _atom(self) -> _Node:
        token = self._next
        if self._take("("):
            node = self._deeper(self._condition)
            self._expect(")")
            return node
        if self._take("has"):
            self._expect("(")
            name = self._name()
            self._expect(")")
            return _Node("condition", lambda values: name in values)
        if token.kind == "name":
            name = self._name()
            return _Node(self.kinds[name], lambda values: values.get(name))
        if token.kind not in ("number", "text"):
            self._refuse(f"expected a name, a number or a text in quotes, found {self._shown()}")
        self._pass()
        if token.kind == "text":
            return _Node("text", lambda values: token.text[1:-1])
        number = float(token.text)
        if not math.isfinite(number):
            self._refuse(f"{token.text[:40]} is too large a number", token.at)
        return _Node("number", lambda values: number)

    def _name(self) -> str:
        token = self._next
        if token.kind != "name":
            self._refuse(f"expected a name, found {self._shown()}")
        name = token.text.strip("`")
        if name not in self.kinds:
            known = printable(", ".join(sorted(self.kinds)))[:600]
            self._refuse(f"{printable(name)[:60]} is not known; there are {known}")
        self._pass()
        self.names[name] = None
        return name

    def _deeper(self, part: Callable[[], _Node]) -> _Node:
        self._depth += 1
        if self._depth > _DEEPEST:
            self._refuse(f"more than {_DEEPEST} levels of brackets, signs and negations")
        node = part()
        self._depth -= 1
        return node


# --- values -----------------------------------------------------------------------------------------------------------


def _negated(value: Value) -> Value:
    return None if value is None else not value


def _all_of(parts: Sequence[_Node], decides: bool) -> Callable[[Values], Value]:
    """The value of parts joined by `or` (one True decides) or `and` (one False decides)."""

    def value(values: Values) -> Value:
        unknown = False
        for part in parts:
            found = part.value(values)
            if found is decides:
                return decides
            unknown |= found is None
        return None if unknown else not decides

    return value


def _chained(first: _Node, links: Sequence[tuple[str, _Node]]) -> Callable[[Values], Value]:
    def value(values: Values) -> Value:
        left, unknown = first.value(values), False
        for sign, node in links:
            right = node.value(values)
            if left is None or right is None:
                unknown = True
            elif not _COMPARISONS[sign](left, right):
                return False
            left = right
        return None if unknown else True

    return value


def _result_of(first: _Node, steps: Sequence[tuple[str, _Node]]) -> Callable[[Values], Value]:
    def value(values: Values) -> Value:
        result = _number(first, values)
        for sign, node in steps:
            number = _number(node, values)
            if result is None or number is None or (sign == "/" and number == 0):
                return None
            result = _step(result, sign, number)
        return result

    return value


def _step(left: float, sign: str, right: float) -> float:
    return {"+": left + right, "-": left - right, "*": left * right}[sign] if sign != "/" else left / right


def _number(node: _Node, values: Values) -> float | None:
    value = node.value(values)
    return value if isinstance(value, int | float) else None
