"""One call of an op, as a program, and operands to make calls of."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from meshwright.program.program import Op, Program, Ref, Symbol, Value


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call of an op, by its full name."""

    name: str
    args: tuple
    kwargs: dict = field(default_factory=dict)
    label: str = ""

    @property
    def base(self):
        return self.name.rsplit(".", 1)[0]

    def __str__(self):
        return f"{self.name}-{self.label}" if self.label else self.name


def program_of(call):
    """(program of that one op, its inputs by name)."""
    values, inputs, tensors = [], [], {}

    def new(tensor):
        values.append(Value(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)))
        return len(values) - 1

    def arg(found):
        if isinstance(found, Tensor):
            number = new(found)
            inputs.append((f"x{number}", number))
            tensors[f"x{number}"] = found
            return Ref(number)
        if isinstance(found, (list, tuple)):
            return tuple(arg(part) for part in found)
        if isinstance(found, torch.dtype):
            return Symbol("dtype", str(found).removeprefix("torch."))
        if isinstance(found, torch.memory_format):
            return Symbol("memory_format", str(found).removeprefix("torch."))
        return found

    args = tuple(arg(found) for found in call.args)
    kwargs = tuple((name, arg(found)) for name, found in call.kwargs.items())
    namespace, name, overload = call.name.split(".")
    function = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    made = function(*call.args, **call.kwargs)
    packed = isinstance(made, (tuple, list))
    outputs = tuple(
        new(tensor) if isinstance(tensor, Tensor) else None
        for tensor in (made if packed else [made])
    )
    op = Op(call.name, args, kwargs, outputs, packed)
    results = tuple((f"y{k}", value) for k, value in enumerate(op.results))
    return Program(tuple(values), tuple(inputs), (op,), results), tensors


# ── operands ─────────────────────────────────────────────────────────────────────────────────────


_numbers = count()


def _random(shape):
    seed = sum((k + 2) * size for k, size in enumerate(shape)) + next(_numbers)
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def f(*shape):
    """Numbers in [-2, 2)."""
    return _random(shape) * 4 - 2


def unit(*shape):
    """Numbers in [0.05, 0.95)."""
    return _random(shape) * 0.9 + 0.05


def above(*shape):
    """Numbers in [1.1, 3.1)."""
    return _random(shape) * 2 + 1.1


def whole(*shape, high=7):
    """Whole numbers in [0, high)."""
    return (_random(shape) * high).long()


def truth(*shape):
    """True or false."""
    return _random(shape) < 0.5
