"""Pickles of plain values, read by a machine of our own that can do nothing else.

Python's unpickler calls whatever a file names, and that of `torch.load(weights_only=True)` calls what is on its list
with any arguments: `bytearray(10**12)`, a tensor beyond its storage, an array of object pointers. Here a name is a word
only. What may be made of it stands in a table of functions that check their arguments (`osp.weights.pickled`), and a
step of the machine makes a value that is no larger than the bytes it was read from.
"""

import mmap
import pickletools
from argparse import Namespace
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import IO, Any, cast

from osp.documents import printable

_DEEPEST = 64  # levels of containers; what training leaves has about ten
_TIMES_SHARED = 8  # how often a stored number may appear in tensors; tied weights make it two or three times
_MORE = 1 << 20  # bytes and values that may be made beyond what the pickle's size bears out
_SCALARS = (str, bytes, int, float, type(None))
# Modules that torch writes by their names of Python 2.
_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}

Make = Callable[["Maker", tuple[Any, ...]], Any]


class RefusedError(ValueError):
    """A pickle asks for something else than plain values; the text names it."""


@dataclass(frozen=True)
class Name:
    """The name of a function or a class in a pickle; it is never looked up."""

    text: str


class Maker:
    """The allowance that the table's functions make values with; it bounds their total size by the size of the file."""

    def __init__(self, size: int, stored: int) -> None:
        self._left, self._stored_left = 4 * size + _MORE, _TIMES_SHARED * stored + _MORE

    def spend(self, size: int) -> None:
        """Raises RefusedError when values are made that are together much larger than their pickle."""
        self._left -= size
        if self._left < 0:
            raise RefusedError("values that are larger than the file")

    def spend_stored(self, size: int) -> None:
        """Raises RefusedError when tensors share storages so often that together they are much larger than these."""
        self._stored_left -= size
        if self._stored_left < 0:
            raise RefusedError("tensors that are larger than the file")


@dataclass(frozen=True)
class Table:
    """The meanings of names: `constants`, `makers` by name, and `builders`, which fill made values, by their type.

    `persistent` gives what stands for a persistent id, which torch has for storages; `stored` is the bytes of these.
    """

    constants: Mapping[str, Any]
    makers: Mapping[str, Make]
    builders: Mapping[type, Callable[[Maker, Any, Any], None]]
    persistent: Callable[[Any], Any]
    stored: int = 0


def read_pickle(file: BytesIO | mmap.mmap, size: int, table: Table) -> Any:
    """The value of the pickle of at most `size` bytes that begins where the file stands, which is then at its end.

    Raises RefusedError for what is no plain value, and errors of many kinds for a pickle that is damaged.
    """
    value = _Machine(size, table).run(pickletools.genops(cast(IO[bytes], file)))
    _check_size(value, size)
    return value


class _Machine:
    """The stack machine of pickles, for the operations that protocol 2 writes of plain values."""

    def __init__(self, size: int, table: Table) -> None:
        self.table, self.maker = table, Maker(size, table.stored)
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self, operations: Iterator[tuple[Any, Any, int | None]]) -> Any:
        """The value that the operations make."""
        for operation, argument, _ in operations:
            name = operation.name
            if name == "STOP":
                return self.stack.pop()
            if name in _PUSHED:
                self.stack.append(argument)
            elif name in _MADE:
                self.stack.append(_MADE[name]())
            elif name in _STEPS:
                _STEPS[name](self, argument)
            elif name != "PROTO":
                raise RefusedError(f"the operation {name}")
        raise ValueError("the pickle has no end")

    def _pop_to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def mark(self, _: Any) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def tuple_of(self, count: int) -> None:
        # A negative slice of a stack that is too short would give fewer values without an error.
        if len(self.stack) < count:
            raise IndexError("the stack is too short")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def marked_tuple(self, _: Any) -> None:
        items = self._pop_to_mark()
        self.stack.append(tuple(items))

    def put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def append(self, _: Any) -> None:
        item = self.stack.pop()
        self._of(list).append(item)

    def extend(self, _: Any) -> None:
        items = self._pop_to_mark()
        self._of(list).extend(items)

    def set_item(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._of(dict, OrderedDict, Counter)[check_key(key)] = value

    def set_items(self, _: Any) -> None:
        items = self._pop_to_mark()
        target = self._of(dict, OrderedDict, Counter)
        for i in range(0, len(items), 2):
            target[check_key(items[i])] = items[i + 1]

    def _of(self, *types: type) -> Any:
        """The value on the stack, which must be of one of these types itself."""
        if type(self.stack[-1]) not in types:
            raise RefusedError(f"items of a {type(self.stack[-1]).__name__}")
        return self.stack[-1]

    def name(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        text = f"{_MODULES.get(module, module)}.{name}"
        if text not in self.table.constants and text not in self.table.makers:
            raise RefusedError(printable(text)[:100])
        self.stack.append(self.table.constants.get(text, Name(text)))

    def call(self, _: Any) -> None:
        arguments, what = self.stack.pop(), self.stack.pop()
        if not isinstance(what, Name) or what.text not in self.table.makers or not isinstance(arguments, tuple):
            raise RefusedError(f"a call of {what.text if isinstance(what, Name) else type(what).__name__}")
        self.stack.append(self.table.makers[what.text](self.maker, arguments))

    def build(self, _: Any) -> None:
        state = self.stack.pop()
        fill = self.table.builders.get(type(self.stack[-1]))
        if fill is None:
            raise RefusedError(f"a changed {type(self.stack[-1]).__name__}")
        fill(self.maker, self.stack[-1], state)

    def persistent(self, _: Any) -> None:
        self.stack.append(self.table.persistent(self.stack.pop()))


_PUSHED = frozenset(
    ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES")
)
_MADE: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "TUPLE": _Machine.marked_tuple,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.extend,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "GLOBAL": _Machine.name,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
}


def check_key(key: Any) -> Any:
    """A value that may be a key or in a set.

    Raises RefusedError for others: to hash a tuple of tuples can take hours.
    """
    if isinstance(key, tuple):
        if len(key) > _DEEPEST or not all(isinstance(part, _SCALARS) for part in key):
            raise RefusedError("keys that are no plain values")
    elif not isinstance(key, _SCALARS):
        raise RefusedError(f"a key that is a {type(key).__name__}")
    return key


def inner_values(value: Any) -> tuple[Any, ...] | list[Any]:
    """The values in a container; none for a value that is no container."""
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, Namespace):
        return list(vars(value).values())
    return value if isinstance(value, list | tuple) else ()


def _check_size(value: Any, size: int) -> None:
    """Raise RefusedError for containers that are too deep, hold themselves, or are large by repetition.

    A list of ten times a list of ten times a list ... is a few bytes, and whoever goes through it never ends.
    """
    counted: dict[int, tuple[int, int]] = {}  # of each container: its levels, and the values in it
    stack = [(value, False)]
    open_: set[int] = set()
    while stack:
        one, is_done = stack.pop()
        inner = inner_values(one)
        if not inner or (id(one) in counted and not is_done):
            continue
        if not is_done:
            if id(one) in open_:
                raise RefusedError("a container that holds itself")
            open_.add(id(one))
            stack.append((one, True))
            stack += [(part, False) for part in inner if inner_values(part)]
            continue
        open_.discard(id(one))
        parts = [counted.get(id(part), (0, 1)) for part in inner]
        counted[id(one)] = 1 + max(levels for levels, _ in parts), sum(values for _, values in parts)
        if counted[id(one)][0] > _DEEPEST or counted[id(one)][1] > 4 * size + _MORE:
            raise RefusedError("containers that are too deep or too large")
