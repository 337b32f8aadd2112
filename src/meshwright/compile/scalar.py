"""Numbers of an optimizer's step, traced: what Python computes from the learning rate and steps.

`Known` numbers (lr, momentum, counts of steps) are the same on every rank: what Python computes
from them is an expression, evaluated on the host at every step, and an input of the program where a
tensor meets it. A comparison of known numbers chooses a branch, which becomes a condition of the
program. `Read` numbers are what `.item()` gives: arithmetic with them is traced, on tensors, and
nothing may depend on which of two is larger but `min` and `max`.
"""

from __future__ import annotations

import builtins
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from meshwright.compile.trace import user_line
from meshwright.errors import NotTraceable

__all__ = ["Condition", "Expression", "Known", "Number", "Numbers", "Read", "evaluate", "patched"]


@dataclass(frozen=True, slots=True)
class Expression:
    """`lr`, or an operation on expressions and plain numbers."""

    operation: str
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        """As Python spells it, nearly."""
        if self.operation == "input":
            return str(self.arguments[0])
        return f"{self.operation}({', '.join(map(str, self.arguments))})"


Condition = tuple[Expression, bool]
"""An expression, and what came out of it where the program was traced."""

_ARITHMETIC: Mapping[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "truediv": operator.truediv,
    "pow": operator.pow, "mod": operator.mod, "floordiv": operator.floordiv, "neg": operator.neg,
    "abs": operator.abs,
}  # fmt: skip
_COMPARISONS: Mapping[str, Callable[..., Any]] = {
    "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "eq": operator.eq, "ne": operator.ne, "truth": operator.truth,
}  # fmt: skip
_MATH: Mapping[str, Callable[..., Any]] = {
    name: vars(math)[name]
    for name in (
        "sqrt", "exp", "log", "log2", "log10", "log1p", "expm1", "cos", "sin", "tanh", "erf",
        "fabs", "pow", "floor", "ceil", "isfinite", "isnan", "isinf",
    )
}  # fmt: skip
_ON_TENSORS: Mapping[str, Callable[..., Any]] = {
    "sqrt": torch.sqrt, "exp": torch.exp, "log": torch.log, "log2": torch.log2,
    "log10": torch.log10, "log1p": torch.log1p, "expm1": torch.expm1, "cos": torch.cos,
    "sin": torch.sin, "tanh": torch.tanh, "erf": torch.erf, "fabs": torch.abs, "pow": torch.pow,
}  # fmt: skip
_OPERATIONS = {**_ARITHMETIC, **_COMPARISONS, **_MATH}


def evaluate(what: Any, inputs: Mapping[str, float]) -> Any:
    """The value of an expression (or a plain number) now."""
    if not isinstance(what, Expression):
        return what
    if what.operation == "input":
        return inputs[what.arguments[0]]
    return _OPERATIONS[what.operation](*(evaluate(part, inputs) for part in what.arguments))


@dataclass(slots=True)
class Numbers:
    """The numbers of one trace.

    Attributes:
        spare: scalar inputs of the program that stand for host values.
        hosts: the expression of each that is used, in order.
        conditions: what the branches taken rest on.
        turn: a second trace takes other values for what is read, so that one that was taken for a
            constant shows.
        outside: the user's line that the trace was asked from, which is none of the step's.
    """

    spare: Sequence[Tensor]
    turn: int = 0
    outside: str = ""
    hosts: dict[Expression, int] = field(default_factory=dict)
    conditions: dict[Expression, bool] = field(default_factory=dict)

    def tensor(self, number: Any) -> Any:
        """A float64 scalar for a traced number; plain ones as they are."""
        if isinstance(number, Read):
            return number.tensor
        if not isinstance(number, Known):
            return number
        place = self.hosts.setdefault(number.expression, len(self.hosts))
        if place >= len(self.spare):
            raise self.refusal(
                f"the optimizer's step makes more than {len(self.spare)} numbers of the learning "
                "rate and the step"
            )
        return self.spare[place]

    def known(self, operation: str, arguments: Sequence[Any]) -> Known:
        """The result of an operation on known and plain numbers."""
        value = _OPERATIONS[operation](*map(_plain, arguments))
        return Known(self, value, Expression(operation, tuple(map(_expression, arguments))))

    def read(self, tensor: Tensor) -> Read:
        """What `.item()` gives."""
        return Read(self, tensor.detach().reshape(()).to(torch.float64))

    def apply(self, operation: str, arguments: Sequence[Any]) -> Number:
        """An operation on numbers of which one is traced."""
        if not any(isinstance(argument, Read) for argument in arguments):
            return self.known(operation, arguments)
        function: Callable[..., Any] | None = {**_ARITHMETIC, **_ON_TENSORS}.get(operation)
        if function is None:
            raise self.refusal(f"math.{operation}() of a number read from a tensor")
        operands: list[Any] = [self.tensor(argument) for argument in arguments]
        return self.read(function(*operands))

    def decide(self, comparison: str, arguments: Sequence[Any]) -> bool:
        """Which way a comparison goes; it becomes a condition of the program."""
        if any(isinstance(argument, Read) for argument in arguments):
            raise self.refusal("a branch depends on a number read from a tensor")
        found = self.known(comparison, arguments)
        return self.conditions.setdefault(found.expression, bool(found.plain))

    def larger(self, a: Any, b: Any, *, least: bool) -> Any:
        """Python's `max(a, b)`, or `min`, of numbers of which one is read."""
        one, two = (self.tensor(x) for x in (a, b))
        second = two < one if least else two > one
        new, old = (
            x if isinstance(x, Tensor) else torch.full_like(second, x, dtype=torch.float64)
            for x in (two, one)
        )
        return self.read(torch.where(second, new, old))

    def refusal(self, what: str) -> NotTraceable:
        """An error that names the user's line."""
        line = user_line()
        return NotTraceable(f"{line}: {what}" if line not in ("", self.outside) else what)


class Number(float):
    """A number that the trace follows; where it is taken for a plain one, a second trace shows."""

    numbers: Numbers
    plain: float

    def __init__(self, numbers: Numbers, plain: float) -> None:
        """It looks like `plain` to whoever does not ask."""
        super().__init__()
        self.numbers, self.plain = numbers, plain

    def __new__(cls, _numbers: Numbers, plain: Any, *_: Any) -> Number:
        """A float of that value."""
        return super().__new__(cls, plain)

    def __int__(self) -> int:
        """A whole number cannot be followed."""
        raise self.numbers.refusal("a number that changes from step to step is made an int")

    __index__ = __trunc__ = __int__
    __hash__ = float.__hash__


class Known(Number):
    """Made of the learning rate, settings and counts of steps."""

    def __init__(self, numbers: Numbers, plain: Any, expression: Expression) -> None:
        """The value in this trace, and how it is computed in any step."""
        super().__init__(numbers, plain)
        self.expression = expression


class Read(Number):
    """Read from a tensor."""

    def __init__(self, numbers: Numbers, tensor: Tensor) -> None:
        """Of a float64 scalar."""
        super().__init__(numbers, float(self))
        self.tensor = tensor

    def __new__(cls, numbers: Numbers, *_: Any) -> Read:
        """Of no value in particular: another in each trace."""
        return float.__new__(cls, 0.6180339887 + 0.1 * numbers.turn)


def _plain(number: Any) -> Any:
    return number.plain if isinstance(number, Number) else number


def _expression(number: Any) -> Any:
    return number.expression if isinstance(number, Known) else number


def _binary(operation: str, *, swapped: bool = False) -> Callable[[Number, Any], Any]:
    def method(self: Number, other: Any) -> Any:
        if not isinstance(other, int | float):
            return NotImplemented
        return self.numbers.apply(operation, (other, self) if swapped else (self, other))

    return method


def _unary(operation: str) -> Callable[[Number], Any]:
    return lambda self: self.numbers.apply(operation, (self,))


def _comparison(operation: str) -> Callable[..., Any]:
    def method(self: Number, *other: Any) -> Any:
        if other and not isinstance(other[0], int | float):
            return NotImplemented
        return self.numbers.decide(operation, (self, *other))

    return method


for _name in ("add", "sub", "mul", "truediv", "pow", "mod", "floordiv"):
    setattr(Number, f"__{_name}__", _binary(_name))
    setattr(Number, f"__r{_name}__", _binary(_name, swapped=True))
for _name in ("neg", "abs"):
    setattr(Number, f"__{_name}__", _unary(_name))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Number, f"__{_name}__", _comparison(_name))
setattr(Number, "__bool__", _comparison("truth"))  # noqa: B010 - as its neighbours
setattr(Number, "__pos__", lambda self: self)  # noqa: B010


@contextmanager
def patched(numbers: Numbers) -> Iterator[None]:
    """Python's `min`, `max` and functions of `math` follow numbers."""
    with ExitStack() as stack:
        for name, least in (("min", True), ("max", False)):
            ours = _extreme(numbers, vars(builtins)[name], least=least)
            stack.enter_context(mock.patch.object(builtins, name, ours))
        for name, function in _MATH.items():
            ours = _math(numbers, name, function)
            stack.enter_context(mock.patch.object(math, name, ours))
        yield


def _extreme(numbers: Numbers, usual: Callable[..., Any], *, least: bool) -> Callable[..., Any]:
    def extreme(*arguments: Any, **how: Any) -> Any:
        given: Iterable[Any] = arguments
        if len(arguments) == 1 and isinstance(arguments[0], list | tuple):
            given = arguments[0]
        if how or not any(isinstance(number, Read) for number in given):
            return usual(*arguments, **how)
        first, *others = given
        for other in others:
            first = numbers.larger(first, other, least=least)
        return first

    return extreme


def _math(numbers: Numbers, name: str, usual: Callable[..., Any]) -> Callable[..., Any]:
    def function(*arguments: Any) -> Any:
        if any(isinstance(argument, Number) for argument in arguments):
            return numbers.apply(name, arguments)
        return usual(*arguments)

    return function
