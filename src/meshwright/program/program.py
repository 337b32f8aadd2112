"""Program: the only intermediate representation. Frozen, hashable, JSON.

Tracing makes one, every pass is `Program -> Program`, lowering makes callables of it. Ops are named
as PyTorch's (`aten.mm.default`); values are numbered; arguments are literals, references to values,
symbols (a dtype) and tuples of these.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

__all__ = [
    "ITEMSIZE",
    "Arg",
    "Op",
    "Phase",
    "Program",
    "Ref",
    "Symbol",
    "Value",
    "map_refs",
    "refs",
    "without_dead_ops",
]

ITEMSIZE = {
    "bool": 1, "uint8": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8,
    "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "complex64": 8, "complex128": 16,
}  # fmt: skip
"""Bytes of one element, by dtype."""

Phase = Literal["forward", "backward", "finish"]


@dataclass(frozen=True, slots=True)
class Ref:
    """A reference to value number `index`."""

    index: int


@dataclass(frozen=True, slots=True)
class Symbol:
    """A framework's constant: `Symbol("dtype", "float32")`.

    `rows` is a number known at run time only: of rows that an op's first operand has.
    """

    kind: str
    name: str


Arg = None | bool | int | float | complex | str | Ref | Symbol | tuple["Arg", ...]


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor: its dtype and shape (global before partitioning, local after)."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return self.elements * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class Op:
    """One operation. `packed` tells that it returns a tuple; unused results are None.

    `region` numbers the user's `torch.utils.checkpoint` region that it is of; 0 is none.
    """

    name: str
    args: tuple[Arg, ...]
    kwargs: tuple[tuple[str, Arg], ...] = ()
    outputs: tuple[int | None, ...] = ()
    packed: bool = False
    phase: Phase = "forward"
    module: str = ""
    source: str = ""
    region: int = 0

    @property
    def base(self) -> str:
        """The name without its overload: `aten.mm` of `aten.mm.default`."""
        return self.name.rsplit(".", 1)[0]

    @property
    def inputs(self) -> tuple[int, ...]:
        """The values it reads, one entry per operand, in argument order."""
        return tuple(refs((self.args, tuple(value for _, value in self.kwargs))))

    @property
    def results(self) -> tuple[int, ...]:
        """The values it makes."""
        return tuple(value for value in self.outputs if value is not None)


@dataclass(frozen=True, slots=True)
class Program:
    """Ops in an order in which they can run, over numbered values.

    `inputs` and `outputs` are (name, value) pairs; a value may be output under several names.
    """

    values: tuple[Value, ...]
    inputs: tuple[tuple[str, int], ...]
    ops: tuple[Op, ...]
    outputs: tuple[tuple[str, int], ...]

    def input(self, name: str) -> int:
        """The value of the named input."""
        return dict(self.inputs)[name]

    def output(self, name: str) -> int:
        """The value of the named output."""
        return dict(self.outputs)[name]

    def producers(self) -> dict[int, int]:
        """Value -> number of the op that makes it (inputs have none)."""
        return {value: place for place, op in enumerate(self.ops) for value in op.results}

    def readers(self) -> dict[int, list[int]]:
        """Value -> numbers of the ops that read it."""
        found: dict[int, list[int]] = {}
        for place, op in enumerate(self.ops):
            for value in dict.fromkeys(op.inputs):
                found.setdefault(value, []).append(place)
        return found

    @property
    def digest(self) -> str:
        """A hash of its content, equal on every machine; where ops come from does not count."""
        bare = [(op.name, _plain(op.args), _settings(op), op.outputs, op.phase) for op in self.ops]
        content = [[(v.dtype, v.shape) for v in self.values], self.inputs, bare, self.outputs]
        text = json.dumps(content, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _settings(op: Op) -> Any:
    """Keyword arguments; those of moves only say why they are there."""
    return None if op.name.startswith("comm.") else _plain(op.kwargs)


def without_dead_ops(program: Program) -> Program:
    """The program without ops whose results nobody reads."""
    needed = {value for _, value in program.outputs}
    kept: list[Op] = []
    for op in reversed(program.ops):
        if needed.intersection(op.results):
            needed.update(op.inputs)
            kept.append(op)
    return replace(program, ops=tuple(reversed(kept)))


def refs(arg: Any) -> Iterator[int]:
    """The values that an argument refers to, in order."""
    if isinstance(arg, Ref):
        yield arg.index
    elif isinstance(arg, tuple):
        for part in arg:
            yield from refs(part)


def map_refs(arg: Any, change: Callable[[int], int]) -> Any:
    """The argument with every reference changed."""
    if isinstance(arg, Ref):
        return Ref(change(arg.index))
    if isinstance(arg, tuple):
        return tuple(map_refs(part, change) for part in arg)
    return arg


def _plain(arg: Any) -> Any:
    if isinstance(arg, Ref):
        return {"ref": arg.index}
    if isinstance(arg, Symbol):
        return {arg.kind: arg.name}
    if isinstance(arg, float | complex):
        return repr(arg)
    if isinstance(arg, tuple):
        return [_plain(part) for part in arg]
    return arg
