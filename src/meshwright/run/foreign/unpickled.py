"""Pickles read as data: a stack machine that builds plain values and never runs what it reads.

`pickle.Unpickler` with a short list of allowed classes still calls them; here a call stays a
`Made`, a name a `Global`, for the formats' readers to make sense of, or to refuse.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Collection
from io import BytesIO
from typing import Any, Final, Protocol, final

from meshwright.errors import StorageError
from meshwright.run.foreign.symbols import Global, Made, Persistent

__all__ = ["PICKLE_BYTES", "allow", "unpickled"]

PICKLE_BYTES: Final = 256 << 20
"""The longest pickle that is read: names and shapes of a few hundred thousand tensors."""

_MARK: Final = object()

_VALUES: Final = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "INT", "LONG", "FLOAT", "BINFLOAT",
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BINSTRING", "SHORT_BINSTRING", "STRING",
}  # fmt: skip
_CONSTANTS: Final = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_FRESH: Final[dict[str, Callable[[], Any]]] = {
    "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple,
}  # fmt: skip
_TUPLES: Final = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUTS: Final = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_GETS: Final = frozenset({"GET", "BINGET", "LONG_BINGET"})
_NOTHING: Final = frozenset({"PROTO", "FRAME"})


class Bytes(Protocol):
    """What a pickle is read from."""

    def read(self, count: int, /) -> bytes:
        """So many bytes, or fewer at the end."""
        ...

    def readline(self) -> bytes:
        """To the end of the line."""
        ...

    def tell(self) -> int:
        """Which byte comes next."""
        ...


def unpickled(data: bytes | Bytes) -> Any:
    """The value of the first pickle in `data`, read without running any of it.

    Raises:
        StorageError: it is no pickle, is cut short, or uses what no writer of tensors uses.
    """
    machine = _Machine()
    stream = BytesIO(data) if isinstance(data, bytes) else data
    try:
        for opcode, argument, _ in pickletools.genops(stream):  # type: ignore[arg-type]
            if opcode.name == "STOP":
                break
            machine.step(opcode.name, argument)
        (value,) = machine.stack
    except StorageError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise StorageError(f"it is no whole pickle: {str(error)[:120]}") from None
    return value


def allow(value: Any, makers: Collection[Global]) -> None:
    """Refuse a pickle that calls anything but `makers`; what they would do is known.

    Raises:
        StorageError: names the call.
    """
    seen: set[int] = set()
    heap = [value]
    while heap:
        item = heap.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Made):
            if item.maker not in makers:
                raise StorageError(
                    f"it calls {str(item.maker)[:100]}, which no weights need; nothing was run"
                )
            heap += [item.args, item.state, item.items, item.pairs]
        elif isinstance(item, dict):
            heap += [*item, *item.values()]
        elif isinstance(item, list | tuple):
            heap += item
        elif isinstance(item, Persistent):
            heap.append(item.key)


@final
class _Machine:
    """The stack and the memo of one pickle."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Do what one opcode says, as far as data goes."""
        if name in _NOTHING:
            return
        if name in _VALUES:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name])
        elif name in _FRESH:
            self.stack.append(_FRESH[name]())
        elif name in _TUPLES:
            self.stack.append(tuple(self._pop(_TUPLES[name])))
        elif name in _PUTS:
            self.memo[int(argument)] = self._top()
        elif name in _GETS:
            self.stack.append(self.memo[int(argument)])
        elif name in _STEPS:
            _STEPS[name](self, argument)
        else:
            raise StorageError(f"it holds the opcode {name}, which no writer of weights uses")

    def _top(self) -> Any:
        if self.stack[-1] is _MARK:
            raise ValueError("a value is missing")
        return self.stack[-1]

    def _pop(self, count: int) -> list[Any]:
        taken = self.stack[len(self.stack) - count :]
        if len(taken) != count or any(item is _MARK for item in taken):
            raise ValueError("a value is missing")
        del self.stack[len(self.stack) - count :]
        return taken

    def _marked(self) -> list[Any]:
        """What was pushed after the last mark."""
        place = len(self.stack) - 1
        while self.stack[place] is not _MARK:
            place -= 1
            if place < 0:
                raise ValueError("a mark is missing")
        taken = self.stack[place + 1 :]
        del self.stack[place:]
        return taken

    def mark(self, _: Any) -> None:
        """MARK."""
        self.stack.append(_MARK)

    def memoize(self, _: Any) -> None:
        """MEMOIZE."""
        self.memo[len(self.memo)] = self._top()

    def tuple(self, _: Any) -> None:
        """TUPLE."""
        self.stack.append(tuple(self._marked()))

    def named(self, argument: Any) -> None:
        """GLOBAL."""
        module, _, name = argument.partition(" ")
        self.stack.append(Global(module, name))

    def stack_named(self, _: Any) -> None:
        """STACK_GLOBAL."""
        module, name = self._pop(2)
        if not (isinstance(module, str) and isinstance(name, str)):
            raise TypeError("a name is no text")
        self.stack.append(Global(module, name))

    def call(self, *, new: bool) -> None:
        """REDUCE, NEWOBJ: remember the call."""
        maker, args = self._pop(2)
        if not isinstance(maker, Global) or not isinstance(args, tuple):
            raise TypeError("a call of what has no name")
        self.stack.append(Made(maker, args, new))

    def build(self, _: Any) -> None:
        """BUILD."""
        (state,) = self._pop(1)
        made = self._top()
        if not isinstance(made, Made):
            raise TypeError("state for what was not made")
        made.state = state

    def append(self, items: list[Any]) -> None:
        """APPEND, APPENDS."""
        target = self._top()
        if isinstance(target, Made):
            target.items += items
        elif isinstance(target, list):
            target += items
        else:
            raise TypeError("items for what holds none")

    def set(self, pairs: list[Any]) -> None:
        """SETITEM, SETITEMS."""
        target = self._top()
        if len(pairs) % 2 or not isinstance(target, dict | Made):
            raise ValueError("keys for what has none")
        into = target.pairs if isinstance(target, Made) else target
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            # A tuple could be nested deeper than its hash can go.
            if not isinstance(key, str | int | float | Made | Global):
                raise TypeError(f"a key is a {type(key).__name__}")
            if key in into:
                raise StorageError(f"the key {ascii(key)[:80]} stands twice")
            into[key] = value

    def persistent(self, _: Any) -> None:
        """BINPERSID."""
        self.stack.append(Persistent(*self._pop(1)))


_STEPS: Final[dict[str, Callable[[_Machine, Any], None]]] = {
    "MARK": _Machine.mark,
    "MEMOIZE": _Machine.memoize,
    "TUPLE": _Machine.tuple,
    "GLOBAL": _Machine.named,
    "STACK_GLOBAL": _Machine.stack_named,
    "REDUCE": lambda machine, _: machine.call(new=False),
    "NEWOBJ": lambda machine, _: machine.call(new=True),
    "BUILD": _Machine.build,
    "APPEND": lambda machine, _: machine.append(machine._pop(1)),  # noqa: SLF001
    "APPENDS": lambda machine, _: machine.append(machine._marked()),  # noqa: SLF001
    "SETITEM": lambda machine, _: machine.set(machine._pop(2)),  # noqa: SLF001
    "SETITEMS": lambda machine, _: machine.set(machine._marked()),  # noqa: SLF001
    "BINPERSID": _Machine.persistent,
    "POP": lambda machine, _: machine.stack.pop(),
}
