"""Random programs: ops of every shape on small tensors, built by running them."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from meshwright.program.layout import REPLICATED, Layout, Partial, Shard, disjoint
from meshwright.program.program import Op, Program, Ref, Symbol, Value
from tests.program.worlds import axes_of


class Graph:
    """A program under construction, with the global tensor of each value."""

    def __init__(self):
        self.tensors = []
        self.inputs = []
        self.ops = []
        self.modules = 0

    def new(self, tensor):
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def input(self, *shape):
        """A fresh input of numbers around one."""
        seed = 100 * len(self.tensors) + sum(shape)
        random = torch.Generator().manual_seed(seed)
        tensor = torch.rand(shape, dtype=torch.float64, generator=random) * 2 - 1
        value = self.new(tensor)
        self.inputs.append((f"x{value}", value))
        return value

    def call(self, name, *args, **kwargs):
        """Run an op; the numbers of its results. Values are passed as `Ref`."""
        base, overload = name.rsplit(".", 1)
        function = getattr(getattr(torch.ops.aten, base), overload)
        made = function(*self._real(args), **kwargs)
        packed = isinstance(made, (tuple, list))
        results = [self.new(t) for t in (made if packed else [made]) if isinstance(t, Tensor)]
        stored = tuple(tuple(a) if isinstance(a, list) else a for a in args)
        module = f"m{len(self.ops) // 3}"
        phase = "forward" if len(self.ops) < 6 else "backward"
        named = tuple(
            (k, Symbol("memory_format", str(v).removeprefix("torch.")))
            if isinstance(v, torch.memory_format)
            else (k, v)
            for k, v in kwargs.items()
        )
        self.ops.append(Op(f"aten.{name}", stored, named, tuple(results), packed, phase, module))
        return results

    def _real(self, arg):
        if isinstance(arg, Ref):
            return self.tensors[arg.index]
        if isinstance(arg, (list, tuple)):
            return [self._real(part) for part in arg]
        return arg

    def program(self, outputs):
        values = tuple(
            Value(str(t.dtype).removeprefix("torch."), tuple(t.shape)) for t in self.tensors
        )
        named = tuple((f"y{k}", value) for k, value in enumerate(outputs))
        return Program(values, tuple(self.inputs), tuple(self.ops), named)

    def given(self):
        return {name: self.tensors[value] for name, value in self.inputs}


def _pick(draw, graph, rank=None):
    fit = [
        k
        for k, t in enumerate(graph.tensors)
        if t.is_floating_point() and (rank is None or t.dim() == rank) and t.numel() <= 400
    ]
    return draw(st.sampled_from(fit)) if fit else None


def _dim(draw, graph, value):
    return draw(st.integers(0, graph.tensors[value].dim() - 1))


def unary(draw, graph, x):
    name = draw(st.sampled_from(["relu", "gelu", "tanh", "neg", "sigmoid", "clone"]))
    graph.call(f"{name}.default", Ref(x))


def scaled(draw, graph, x):
    how = draw(st.sampled_from(["mul.Tensor", "div.Tensor", "add.Tensor"]))
    graph.call(how, Ref(x), 1.5)


def binary(draw, graph, x):
    shape = tuple(graph.tensors[x].shape)
    fit = [k for k, t in enumerate(graph.tensors) if t.shape == shape and t.is_floating_point()]
    other = draw(st.sampled_from(["same", "row", "fresh"]))
    if other == "same":
        y = draw(st.sampled_from(fit))
    else:
        y = graph.input(*(shape if other == "fresh" else shape[1:]))
    name = draw(st.sampled_from(["add", "sub", "mul"]))
    graph.call(f"{name}.Tensor", *draw(st.permutations([Ref(x), Ref(y)])))


def masked(draw, graph, x):
    shape = tuple(graph.tensors[x].shape)
    (mask,) = graph.call("gt.Scalar", Ref(graph.input(*shape)), 0.0)
    graph.call("where.self", Ref(mask), Ref(x), Ref(graph.input(*shape)))


def product(draw, graph, x):
    tensor = graph.tensors[x]
    width = draw(st.integers(2, 6))
    if tensor.dim() == 2:
        y = graph.input(tensor.shape[1], width)
        if draw(st.booleans()):
            graph.call("addmm.default", Ref(graph.input(width)), Ref(x), Ref(y))
        else:
            graph.call("mm.default", Ref(x), Ref(y))
    elif tensor.dim() == 3:
        y = graph.input(tensor.shape[0], tensor.shape[2], width)
        graph.call("bmm.default", Ref(x), Ref(y))


def gram(draw, graph, x):
    if graph.tensors[x].dim() == 2:
        (turned,) = graph.call("t.default", Ref(x))
        graph.call("mm.default", *draw(st.permutations([Ref(x), Ref(turned)])))


def total(draw, graph, x):
    dims = draw(st.lists(st.integers(0, graph.tensors[x].dim() - 1), unique=True, min_size=1))
    name = draw(st.sampled_from(["sum.dim_IntList", "amax.default", "sum.dim_IntList"]))
    graph.call(name, Ref(x), dims, draw(st.booleans()))


def turned(draw, graph, x):
    order = draw(st.permutations(range(graph.tensors[x].dim())))
    graph.call("permute.default", Ref(x), list(order))


def viewed(draw, graph, x):
    shape = list(graph.tensors[x].shape)
    (x,) = graph.call("clone.default", Ref(x), memory_format=torch.contiguous_format)
    dim = draw(st.integers(0, len(shape) - 1))
    factors = [k for k in range(2, shape[dim]) if shape[dim] % k == 0]
    if factors and draw(st.booleans()):
        part = draw(st.sampled_from(factors))
        graph.call(
            "view.default", Ref(x), [*shape[:dim], part, shape[dim] // part, *shape[dim + 1 :]]
        )
    elif dim + 1 < len(shape):
        joined = shape[dim] * shape[dim + 1]
        graph.call("view.default", Ref(x), [*shape[:dim], joined, *shape[dim + 2 :]])


def spread(draw, graph, x):
    dim = draw(st.integers(0, graph.tensors[x].dim()))
    (wider,) = graph.call("unsqueeze.default", Ref(x), dim)
    shape = list(graph.tensors[wider].shape)
    shape[dim] = draw(st.integers(2, 3))
    graph.call("expand.default", Ref(wider), shape)


def joined(draw, graph, x):
    dim = _dim(draw, graph, x)
    y = graph.input(*graph.tensors[x].shape)
    name = draw(st.sampled_from(["cat.default", "stack.default"]))
    graph.call(name, [Ref(x), Ref(y)], dim)


def cut(draw, graph, x):
    dim = _dim(draw, graph, x)
    size = graph.tensors[x].shape[dim]
    how = draw(st.sampled_from(["slice", "select", "split", "tril"]))
    if how == "slice" and size > 1:
        graph.call("slice.Tensor", Ref(x), dim, 1, size)
    elif how == "select" and graph.tensors[x].dim() > 1:
        graph.call("select.int", Ref(x), dim, size - 1)
    elif how == "split" and size > 1:
        graph.call("split.Tensor", Ref(x), (size + 1) // 2, dim)
    elif graph.tensors[x].dim() > 1:
        graph.call("tril.default", Ref(x))


def normalised(draw, graph, x):
    if draw(st.booleans()):
        graph.call("_softmax.default", Ref(x), _dim(draw, graph, x), False)
        return
    size = graph.tensors[x].shape[-1]
    w, b = graph.input(size), graph.input(size)
    graph.call("native_layer_norm.default", Ref(x), [size], Ref(w), Ref(b), 1e-2)


def summed_along(draw, graph, x):
    graph.call("cumsum.default", Ref(x), _dim(draw, graph, x))


STEPS = (
    unary, scaled, binary, binary, masked, product, product, gram, total, turned, viewed, viewed,
    spread, joined, cut, normalised, summed_along,
)  # fmt: skip


@st.composite
def graphs(draw, most=10):
    """(program, inputs by name, global tensor of each value)."""
    graph = Graph()
    for _ in range(draw(st.integers(1, 2))):
        graph.input(*draw(st.lists(st.integers(2, 6), min_size=2, max_size=3)))
    for _ in range(draw(st.integers(1, most))):
        x = _pick(draw, graph)
        if x is None or graph.tensors[x].dim() == 0:
            continue
        draw(st.sampled_from(STEPS))(draw, graph, x)
    last = [k for k, t in enumerate(graph.tensors) if t.is_floating_point()]
    outputs = [last[-1], *draw(st.lists(st.sampled_from(last), max_size=2))]
    return graph.program(outputs), graph.given(), graph.tensors


@st.composite
def placed(draw, shape, axes, *, partial=False):
    """Any legal layout for a value of this shape."""
    found = {}
    for axis in axes:
        choices = [None]
        for dim, size in enumerate(shape):
            for outer, unit in ((1, 1), (2, 1), (1, 2), (3, 1)):
                shard = Shard(dim, outer, unit)
                taken = [s for s in found.values() if isinstance(s, Shard) and s.dim == dim]
                fits = size % (outer * unit) == 0 and size // (outer * unit) >= 2
                if fits and all(s == shard or disjoint(size, s, shard) for s in taken):
                    choices.append(shard)
        if partial:
            choices.append(Partial())
        found[axis.name] = draw(st.sampled_from(choices))
    return Layout.of(axes, found)


@st.composite
def annotated(draw, most=10):
    """(program, inputs, tensors, axes, pinned, stored, layouts to deliver)."""
    program, given, tensors = draw(graphs(most))
    axes = axes_of(*draw(st.sampled_from([(2,), (3,), (2, 2), (2, 1)])))
    pinned, stored = {}, {}
    for _, value in program.inputs:
        how = draw(st.sampled_from(["pinned", "open", "stored", "pinned"]))
        if how == "pinned":
            pinned[value] = draw(placed(program.values[value].shape, axes, partial=True))
        elif how == "stored":
            stored[value] = draw(placed(program.values[value].shape, axes))
    made = sorted(program.producers())
    for value in draw(st.lists(st.sampled_from(made), max_size=2)) if made else []:
        pinned[value] = draw(placed(program.values[value].shape, axes))
    outputs = {}
    for name, value in program.outputs:
        if draw(st.booleans()):
            outputs[name] = draw(placed(program.values[value].shape, axes, partial=True))
    return program, given, tensors, axes, pinned, stored, outputs


def close(tensor):
    """How near a partitioned result must be: summing in another order, ten ops deep."""
    return 1e-11 * max(1.0, float(tensor.abs().max())) if tensor.numel() else 0.0


def whole(program):
    """Every output on every rank."""
    return {name: REPLICATED for name, _ in program.outputs}


__all__ = ["Graph", "annotated", "close", "graphs", "placed", "whole"]
