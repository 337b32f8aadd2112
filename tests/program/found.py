"""Cases that random programs found and that failed once, as small as they became."""

from __future__ import annotations

from meshwright.plan.mesh import Axis
from meshwright.program.layout import Layout, Shard
from meshwright.program.program import Ref
from tests.program.cases import Case
from tests.program.graphs import Graph

DATA = (Axis("data", 2),)
PAIR = (Axis("data", 2), Axis("tensor", 2))


def on(**shards):
    """A layout, by axis."""
    return Layout(tuple(shards.items()))


def later_axis_is_said():
    """What an earlier axis found cut across what the user said of a later one."""
    graph = Graph()
    x, y = graph.input(4), graph.input(4)
    (made,) = graph.call("add.Tensor", Ref(x), Ref(y))
    (held,) = graph.call("meshwright.annotate.default", Ref(x), "tensor", "")
    return Case(graph, (made, held), PAIR, {y: on(data=Shard(0, outer=2))})


def later_axis_is_wanted():
    """The same, for a layout that is wanted of an input."""
    graph = Graph()
    x, y = graph.input(4), graph.input(4)
    (made,) = graph.call("lerp.Scalar", Ref(x), Ref(y), 0.25)
    said = {y: on(data=Shard(0, outer=2))}
    return Case(graph, (made,), PAIR, said, {}, {x: on(tensor=Shard(0))})


def rows_of_a_joined_table():
    """Ranks held some rows of each of three tables, and looked up as if they were one run."""
    graph = Graph()
    parts = [graph.input(2, 1) for _ in range(3)]
    (table,) = graph.call("cat.default", [Ref(part) for part in parts], 0)
    (made,) = graph.call("embedding.default", Ref(table), Ref(graph.index(6, 2, 2)))
    return Case(graph, (made,), DATA, {parts[2]: on(data=Shard(0))})


def an_uneven_exchange():
    """The explanation told half of what an all-to-all moved."""
    graph = Graph()
    x = graph.input(3, 2)
    return Case(graph, (x,), DATA, {x: on(data=Shard(1))}, {}, {}, {"y0": on(data=Shard(0))})


def a_halo():
    """The explanation told as moved what a rank kept."""
    graph = Graph()
    x = graph.input(2, 2, 3, 2)
    args = (Ref(x), [2, 2], [1, 1], [0, 0])
    _, places = graph.call("max_pool2d_with_indices.default", *args)
    axes = (Axis("context", 2),)
    return Case(graph, (places,), axes, {x: on(context=Shard(2))})


def known_too_late():
    """A product chose before it was known where its larger operand lies."""
    graph = Graph()
    x, w, beside = graph.input(2, 4), graph.input(4, 8), graph.input(4, 8)
    (made,) = graph.call("mm.default", Ref(x), Ref(w))
    (total,) = graph.call("add.Tensor", Ref(w), Ref(beside))
    said = {x: on(data=Shard(0)), beside: on(data=Shard(1))}
    return Case(graph, (made, total), DATA, said)


FOUND = (
    later_axis_is_said, later_axis_is_wanted, rows_of_a_joined_table, an_uneven_exchange,
    a_halo, known_too_late,
)  # fmt: skip
