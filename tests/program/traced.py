"""Random programs as users' code: a loss and its gradients, as the tracer reads them."""

from __future__ import annotations

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from meshwright.comm.local import run_local
from meshwright.compile.interpret import interpret
from meshwright.compile.lower import call
from meshwright.compile.trace import Places, Tagger, trace_function
from meshwright.program.program import Program
from tests.program.cases import annotations, graphs, meshes
from tests.program.graphs import LARGEST, Graph


class TracedGraph(Graph):
    """The loss of a graph and its gradients, with the global tensor of each value."""

    def __init__(self, graph):
        super().__init__(graph.axes)
        self.lines = [*graph.lines, "graph = TracedGraph(graph)"]
        self.made, constants = _trace(graph)
        given = {name: graph.given().get(name, constants.get(name)) for name, _ in self.made.inputs}
        self.inputs, self.ops = list(self.made.inputs), list(self.made.ops)
        seen = {value: given[name] for name, value in self.inputs}
        watch = lambda _number, _op, values: seen.update(values)  # noqa: E731
        run_local([interpret(self.made, given, watch=watch)])
        self.tensors = [seen[value] for value in range(len(self.made.values))]
        eager = _differentiated(graph, graph.given())
        for name, value in self.made.outputs:
            torch.testing.assert_close(self.tensors[value], eager[name], rtol=1e-9, atol=1e-9)

    @property
    def results(self):
        """The loss and the gradients."""
        return tuple(dict.fromkeys(value for _, value in self.made.outputs))

    def program(self, outputs):
        named = tuple((f"y{k}", value) for k, value in enumerate(outputs))
        return Program(self.made.values, self.made.inputs, self.made.ops, named)


def _differentiated(graph, given, tagger=None):
    """The graph's loss and its gradients to every input that it depends on."""
    values = {value: given[name] for name, value in graph.inputs}
    leaves = {name: v for name, v in graph.inputs if values[v].is_floating_point()}
    for value in leaves.values():
        values[value] = values[value].detach().requires_grad_()
    for op in graph.ops:
        values |= dict(zip(op.results, call(op, values, {}), strict=True))
    read = {value for op in graph.ops for value in op.inputs}
    ends = [t for v, t in values.items() if v not in read and t.is_floating_point()]
    loss = torch.stack([(end * end + end).sum() for end in ends]).sum()
    if tagger is not None:
        tagger.phase = "backward"
    found = torch.autograd.grad(loss, [values[v] for v in leaves.values()], allow_unused=True)
    grads = {f"gradient/{n}": g for n, g in zip(leaves, found, strict=True) if g is not None}
    return {"loss": loss.detach(), **grads}


def _trace(graph):
    with FakeTensorMode():
        fakes = {n: torch.empty(t.shape, dtype=t.dtype) for n, t in graph.given().items()}
    places = Places()

    def tagged(inputs):
        with Tagger(places) as tagger:
            return _differentiated(graph, inputs, tagger)

    return trace_function(tagged, fakes, places, lambda tensor: tensor)


@st.composite
def traces(draw, most=6):
    """Cases of traced programs."""
    graph = draw(graphs(draw(meshes()), most))
    assume(_smooth(graph))
    traced = TracedGraph(graph)
    assume(all(_small(t) for t in traced.tensors))
    return draw(annotations(traced, traced.results))


def _smooth(graph):
    """Whether torch has its gradient."""
    try:
        found = _differentiated(graph, graph.given())
    except (NotImplementedError, RuntimeError):
        return False
    return all(_small(tensor) for tensor in found.values())


def _small(tensor):
    return not tensor.is_floating_point() or bool((tensor.abs() <= LARGEST**2).all())


__all__ = ["TracedGraph", "traces"]
