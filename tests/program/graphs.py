"""Programs under construction: ops are run as they are added, on small tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import meshwright.compile.annotate
import meshwright.compile.window  # noqa: F401 - both register ops
from meshwright.program.layout import REPLICATED
from meshwright.program.program import Op, Program, Ref, Symbol, Value

LARGEST = 1e3
"""Of any number in a random program: errors of rounding stay small beside it."""

ELEMENTS = 512
"""Of any tensor in a random program."""


class Unfit(Exception):
    """An op that made what random programs shall not hold."""


class Graph:
    """A program under construction, with the global tensor of each value.

    Attributes:
        axes: of the mesh that annotations in it name.
        tensors: of each value.
        exact: values that no rounding went into, so that comparisons of them hold on every rank.
        lines: the source that builds this graph.
    """

    def __init__(self, axes=()):
        self.axes = axes
        self.tensors = []
        self.inputs = []
        self.ops = []
        self.exact = set()
        self.lines = []

    def new(self, tensor):
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def input(self, *shape):
        """A fresh input of numbers between -1 and 1."""
        return self._given("input", shape, self._random(shape) * 2 - 1)

    def index(self, high, *shape):
        """A fresh input of whole numbers below `high`."""
        return self._given("index", (high, *shape), (self._random(shape) * high).long())

    def mask(self, *shape):
        """A fresh input of truth values."""
        return self._given("mask", shape, self._random(shape) < 0.5)

    def _random(self, shape):
        random = torch.Generator().manual_seed(100 * len(self.tensors) + sum(shape))
        return torch.rand(shape, dtype=torch.float64, generator=random)

    def _given(self, kind, args, tensor):
        value = self.new(tensor)
        self.inputs.append((f"x{value}", value))
        self.exact.add(value)
        self.lines.append(f"graph.{kind}({', '.join(map(str, args))})  # {value}")
        return value

    def call(self, name, *args, **kwargs):
        """Run an op; the numbers of its results. Values are passed as `Ref`."""
        full = name if name.startswith("meshwright.") else f"aten.{name}"
        namespace, base, overload = full.split(".")
        function = getattr(getattr(getattr(torch.ops, namespace), base), overload)
        made = function(*self._real(args), **{k: self._real(v) for k, v in kwargs.items()})
        packed = isinstance(made, (tuple, list))
        results = [self.new(t) for t in (made if packed else [made])]
        named = tuple((k, _plain(v)) for k, v in kwargs.items())
        module = f"m{len(self.ops) // 3}"
        phase = "forward" if len(self.ops) < 6 else "backward"
        op = Op(full, _plain(args), named, tuple(results), packed, phase, module)
        self.ops.append(op)
        said = [*map(repr, args), *(f"{k}={v!r}" for k, v in kwargs.items())]
        self.lines.append(f"graph.call({name!r}, {', '.join(said)})  # {results}")
        if base in _EXACT and self.exact.issuperset(op.inputs):
            self.exact.update(results)
        return results

    def _real(self, arg):
        if isinstance(arg, Ref):
            return self.tensors[arg.index]
        if isinstance(arg, (list, tuple)):
            return [self._real(part) for part in arg]
        return arg

    def attempt(self, step, *args):
        """Run `step(*args)`; what it added is taken back where it made what is unfit."""
        marks = [len(found) for found in (self.tensors, self.inputs, self.ops, self.lines)]
        try:
            step(*args)
            for tensor in self.tensors[marks[0] :]:
                if not _fit(tensor):
                    raise Unfit
        except Unfit:
            for found, mark in zip(
                (self.tensors, self.inputs, self.ops, self.lines), marks, strict=True
            ):
                del found[mark:]
            self.exact = {value for value in self.exact if value < marks[0]}

    def program(self, outputs):
        values = tuple(
            Value(str(t.dtype).removeprefix("torch."), tuple(t.shape)) for t in self.tensors
        )
        named = tuple((f"y{k}", value) for k, value in enumerate(outputs))
        return Program(values, tuple(self.inputs), tuple(self.ops), named)

    def given(self):
        return {name: self.tensors[value] for name, value in self.inputs}

    def numbers(self, rank=None, least=0):
        """Values of numbers that have `rank` dims, or at least so many."""
        return [
            k
            for k, t in enumerate(self.tensors)
            if t.is_floating_point() and t.dim() >= least and rank in (None, t.dim())
        ]

    def shape(self, value):
        return tuple(self.tensors[value].shape)


_EXACT = frozenset(
    """
    relu neg abs clone view _unsafe_view reshape permute transpose t expand unsqueeze squeeze slice
    select split split_with_sizes unbind cat stack flip roll tril triu amax amin index index_select
    gather embedding constant_pad_nd where masked_fill maximum minimum sort topk annotate arange
    full ones zeros gt ge eq logical_not bitwise_and argmax argmin
    """.split()  # noqa: SIM905 - a table of words
)


def _plain(arg):
    """An argument as programs hold it."""
    if isinstance(arg, (list, tuple)):
        return tuple(_plain(part) for part in arg)
    if isinstance(arg, (torch.dtype, torch.memory_format)):
        kind = "dtype" if isinstance(arg, torch.dtype) else "memory_format"
        return Symbol(kind, str(arg).removeprefix("torch."))
    return arg


def _fit(tensor):
    if not isinstance(tensor, Tensor) or not 0 < tensor.numel() <= ELEMENTS:
        return False
    largest = float(tensor.abs().max()) if tensor.dtype != torch.bool else 0.0
    return math.isfinite(largest) and largest <= LARGEST


def close(*tensors):
    """How near partitioned results must be: sums are taken in another order."""
    return 1e-12 * max(1.0, *(float(t.abs().max()) for t in tensors if t.is_floating_point()))


def whole(program):
    """Every output on every rank."""
    return {name: REPLICATED for name, _ in program.outputs}


__all__ = ["Graph", "Unfit", "close", "whole"]
