"""Random cases: a program, a mesh, and what the user says of how its values lie."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import strategies as st

from meshwright.plan.mesh import Axis
from meshwright.program.layout import Layout, Partial, Shard, disjoint
from meshwright.program.program import Program
from tests.program import steps_algebra, steps_layers, steps_shape
from tests.program.graphs import Graph
from tests.program.steps_algebra import SIZES

MESHES = ((2,), (3,), (4,), (2, 2), (2, 3), (3, 2), (2, 4), (4, 2), (2, 1))

RANKS = (2, 3, 1, 4, 2, 3)
"""Of inputs; the first are what hypothesis shrinks to."""

NAMES = {1: (("data",), ("tensor",), ("context",)), 2: (("data", "tensor"), ("data", "context"))}
"""Axes of meshes of one and two: rules and partitioning look at some names."""


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """A program on a mesh, with its annotations.

    Attributes:
        graph: the program as it was built, with the global tensor of each value.
        outputs: values.
        axes: of the mesh.
        pinned, stored, wanted: as `propagate` takes them.
        delivered: output name -> layout; outputs that are not named stay as they come.
        program: of the graph.
    """

    graph: Graph
    outputs: tuple[int, ...]
    axes: tuple[Axis, ...]
    pinned: dict[int, Layout] = field(default_factory=dict)
    stored: dict[int, Layout] = field(default_factory=dict)
    wanted: dict[int, Layout] = field(default_factory=dict)
    delivered: dict[str, Layout] = field(default_factory=dict)
    program: Program | None = None

    def __post_init__(self):
        object.__setattr__(self, "program", self.graph.program(self.outputs))

    def __repr__(self):
        """The source that makes it."""
        said = (self.pinned, self.stored, self.wanted, self.delivered)
        parts = [list(self.outputs), self.axes, *said]
        return "\n".join(
            ["", *self.graph.lines, "Case(graph, " + ", ".join(map(repr, parts)) + ")"]
        )

    def _repr_pretty_(self, printer, cycle):
        printer.text(repr(self))  # in place of hypothesis' own

    @property
    def annotations(self):
        """What `propagate` takes after the program and the axes."""
        return self.pinned, self.stored, self.wanted


@st.composite
def meshes(draw):
    """One or two axes of two to four, at most eight ranks."""
    sizes = draw(st.sampled_from(MESHES))
    names = draw(st.sampled_from(NAMES[len(sizes)]))
    return tuple(Axis(name, size) for name, size in zip(names, sizes, strict=True))


STEPS = (steps_algebra.STEPS, steps_shape.STEPS, steps_layers.STEPS)


@st.composite
def graphs(draw, axes, most=12, steps=STEPS):
    """A graph of at most so many steps, each of one op or a few."""
    graph = Graph(axes)
    for _ in range(draw(st.integers(1, 2))):
        graph.input(*(draw(st.sampled_from(SIZES)) for _ in range(draw(st.sampled_from(RANKS)))))
    draw(stepped(graph, steps))
    for _ in range(most - 1):
        if not draw(st.integers(0, 19)):  # rarely; shrinks to less steps
            break
        draw(stepped(graph, steps))
    return graph


@st.composite
def stepped(draw, graph, steps):
    """One step more."""
    fit = graph.numbers(least=1)
    x = draw(st.sampled_from(fit[-3:] if draw(st.booleans()) else fit))
    step = draw(st.sampled_from(draw(st.sampled_from(steps))))
    graph.attempt(step, draw, graph, x)


@st.composite
def placed(draw, shape, axes, *, partial=False):
    """Any legal layout for a value of this shape."""
    found = {}
    for axis in axes:
        choices = [None]
        for dim, size in enumerate(shape):
            for outer, unit in ((1, 1), (1, 1), (1, 1), (2, 1), (1, 2), (3, 1)):
                shard = Shard(dim, outer, unit)
                taken = [s for s in found.values() if isinstance(s, Shard) and s.dim == dim]
                fits = size % (outer * unit) == 0 and size // (outer * unit) >= 2
                if fits and all(s == shard or disjoint(size, s, shard) for s in taken):
                    choices.append(shard)
        if partial:
            choices.append(Partial())
        found[axis.name] = draw(st.sampled_from(choices))
    return Layout.of(axes, found)


_SAID = ("open", "pinned", "pinned", "open", "stored", "wanted", "both")


@st.composite
def cases(draw, most=12, ways=_SAID, steps=STEPS):
    """Programs of up to `most` steps; of each input something is said, or nothing."""
    graph = draw(graphs(draw(meshes()), most, steps))
    last = len(graph.tensors) - 1
    others = draw(st.lists(st.integers(0, last), max_size=3))
    return draw(annotations(graph, tuple(dict.fromkeys([last, *others])), ways))


@st.composite
def annotations(draw, graph, outputs, ways=_SAID):
    """A case of a graph."""
    axes = graph.axes
    pinned, stored, wanted = {}, {}, {}
    for _, value in graph.inputs:
        shape, real = graph.shape(value), graph.tensors[value].is_floating_point()
        # The first is split, so that there is something to complete.
        how = draw(st.sampled_from(ways)) if pinned or stored or wanted else "pinned"
        if how in ("pinned", "both"):
            pinned[value] = draw(placed(shape, axes, partial=real and how == "pinned"))
        if how == "stored":
            stored[value] = draw(placed(shape, axes))
        elif how == "both":  # at rest split further over the axes that work does not split
            rest = draw(placed(shape, axes))
            stored[value] = _beside(shape, axes, pinned[value], rest)
        elif how == "wanted":
            wanted[value] = draw(placed(shape, axes))
    made = [
        v
        for op in graph.ops
        for v in op.results
        if graph.tensors[v].dim() and op.base != "meshwright.annotate"
    ]
    for value in draw(st.lists(st.sampled_from(made), max_size=3, unique=True)) if made else []:
        said = pinned if "wanted" not in ways or draw(st.booleans()) else wanted
        said[value] = draw(placed(graph.shape(value), axes))
    delivered = {}
    for k, value in enumerate(outputs):
        if draw(st.booleans()):
            real = graph.tensors[value].is_floating_point()
            delivered[f"y{k}"] = draw(placed(graph.shape(value), axes, partial=real))
    return Case(graph, outputs, axes, pinned, stored, wanted, delivered)


def _beside(shape, axes, work, rest):
    """Of `rest`, what can stand beside `work`."""
    free = {}
    for name, place in rest.placements:
        taken = [s for _, s in work.placements if s.dim == place.dim]
        if work.on(name) is None and not taken:
            free[name] = place
    return Layout.of(axes, free)


@st.composite
def annotated(draw, most=10):
    """(program, inputs, tensors, axes, pinned, stored, layouts to deliver) of a case."""
    case = draw(cases(most, ("pinned", "open", "stored", "pinned")))
    said = (case.pinned, case.stored, case.delivered)
    return case.program, case.graph.given(), case.graph.tensors, case.axes, *said


__all__ = ["Case", "annotated", "annotations", "cases", "graphs", "meshes", "placed"]
