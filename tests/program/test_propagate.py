"""Propagation: any annotations are completed to a program that computes the same."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings

from meshwright.program.layout import REPLICATED, Layout, Partial, Shard, respelled
from meshwright.program.partition import COLLECTIVES, partition
from meshwright.program.program import Ref
from meshwright.program.propagate import propagate
from meshwright.program.rules import carry_of
from tests.program.cases import annotated
from tests.program.graphs import Graph, close
from tests.program.worlds import assert_holds, axes_of, everywhere, give, run_everywhere


@settings(max_examples=150)
@given(case=annotated())
def test_every_rank_together_computes_what_one_does(case):
    program, given_, tensors, axes, pinned, stored, outputs = case
    found, laid, _ = run_everywhere(
        program, axes, give(program, given_, axes), outputs, pinned, stored
    )
    for name, value in program.outputs:
        wanted = outputs.get(name, laid[name])
        assert respelled(program.values[value].shape, laid[name], wanted, axes) == wanted
        parts = [rank[name] for rank in found]
        assert_holds(parts, tensors[value], laid[name], axes, close(*tensors))


@given(case=annotated())
def test_what_was_pinned_or_stored_is_never_changed(case):
    program, _, _, axes, pinned, stored, _ = case
    completed = propagate(program, axes, pinned, stored)
    for (_, value), layout in zip(program.inputs, completed.inputs, strict=True):
        wanted = {**pinned, **stored}.get(value)
        assert wanted is None or layout == wanted


@given(case=annotated())
def test_it_is_deterministic(case):
    program, _, _, axes, pinned, stored, _ = case
    completed = propagate(program, axes, pinned, stored)
    items = list(pinned.items())
    random.Random(0).shuffle(items)
    assert propagate(program, axes, dict(items), stored) == completed


@given(case=annotated())
def test_nothing_more_can_be_carried(case):
    """The fix point: no op is left that could keep an operand or a result where it was found."""
    program, _, _, axes, pinned, _, _ = case
    axis = axes[0]
    completed = propagate(program, axes[:1], {v: _over(p, axes[:1]) for v, p in pinned.items()})
    for op, rule, carried in zip(program.ops, completed.rules, completed.carried, strict=True):
        if carried:
            continue
        inside = zip((*op.inputs, *op.results), (*rule.operands, *rule.results), strict=True)
        for value, dims in inside:
            shard = completed.places[axis.name].get(value)
            carry = carry_of(rule, dims, shard) if isinstance(shard, Shard) else None
            windows = axis.name != "context" and carry and carry.factor in dict(rule.halos)
            if carry is not None and not windows:
                assert rule.sizes[carry.factor] // (carry.outer * carry.unit) < axis.size


def _over(layout, axes):
    return Layout.of(axes, dict(layout.placements))


@given(case=annotated())
def test_what_was_found_if_pinned_is_found_again(case):
    program, _, _, axes, pinned, stored, _ = case
    first = propagate(program, axes, pinned, stored)
    found = {value: layout for (_, value), layout in zip(program.inputs, first.inputs, strict=True)}
    again = propagate(program, axes, {**found, **pinned}, stored)
    assert again.inputs == first.inputs


@given(case=annotated())
def test_every_rank_runs_the_same_ops(case):
    """Collectives meet only where all ranks come to them in one order."""
    program, _, _, axes, pinned, stored, outputs = case
    completed = propagate(program, axes, pinned, stored)
    cut = [partition(program, completed, axes, here, outputs) for here in everywhere(axes)]
    names = [[(op.name, op.outputs, op.inputs) for op in local.program.ops] for local in cut]
    assert all(found == names[0] for found in names)
    assert all([p for _, p in local.origin] == [p for _, p in cut[0].origin] for local in cut)


@given(case=annotated())
def test_a_mesh_of_one_rank_changes_nothing(case):
    program, _, _, _, _, _, _ = case
    axes = axes_of(1)
    local = partition(program, propagate(program, axes, {}), axes, {"data": 0}, {})
    kept = [op for op in program.ops if op.base != "meshwright.annotate"]
    assert [op.name for op in local.program.ops] == [op.name for op in kept]
    assert [layout for _, layout in local.origin] == [REPLICATED] * len(local.program.values)
    for mine, whole in zip(local.program.ops, kept, strict=True):
        shapes = [
            [p.values[v].shape for v in op.results]
            for p, op in ((local.program, mine), (program, whole))
        ]
        assert shapes[0] == shapes[1]


# ── what it finds, by example ────────────────────────────────────────────────────────────────────


def linear_layer(bias=True):
    graph = Graph()
    x, w = graph.input(6, 4), graph.input(8, 4)
    (turned,) = graph.call("t.default", Ref(w))
    if bias:
        (y,) = graph.call("addmm.default", Ref(graph.input(8)), Ref(x), Ref(turned))
    else:
        (y,) = graph.call("mm.default", Ref(x), Ref(turned))
    return graph.program([y]), x, w, y


def collectives(program, axes, pinned, stored=None, outputs=None):
    completed = propagate(program, axes, pinned, stored)
    local = partition(program, completed, axes, everywhere(axes)[0], outputs or {})
    found = [op.name.removeprefix("comm.") for op in local.program.ops if op.name in COLLECTIVES]
    return found, completed, local


def test_samples_pass_through_a_layer_without_a_collective():
    program, x, _, y = linear_layer()
    axes = axes_of(2)
    rows = Layout.of(axes, {"data": Shard(0)})
    found, completed, local = collectives(program, axes, {x: rows})
    assert found == []
    assert completed.places["data"][y] == Shard(0)
    assert local.origin[local.program.output("y0")][1] == rows


def test_a_split_contraction_owes_a_sum_and_the_bias_counts_once():
    program, x, _, _ = linear_layer()
    axes = axes_of(2)
    columns = Layout.of(axes, {"data": Shard(1)})
    found, completed, local = collectives(program, axes, {x: columns})
    assert found == []
    assert completed.inputs[1] == columns, "the weight is open, and follows"
    assert local.origin[local.program.output("y0")][1] == Layout.of(axes, {"data": Partial()})
    assert [op.name for op in local.program.ops if op.name.startswith("comm.")] == ["comm.mask"]


def test_an_open_weight_takes_what_its_reader_wants():
    program, x, _, y = linear_layer(bias=False)
    axes = axes_of(2)
    wanted = Layout.of(axes, {"data": Shard(1)})
    found, completed, _ = collectives(program, axes, {x: REPLICATED, y: wanted})
    assert found == []
    assert completed.inputs[1] == Layout.of(axes, {"data": Shard(0)})


def test_a_stored_weight_rests_split_through_its_views_and_is_gathered_to_be_read():
    program, x, w, _ = linear_layer(bias=False)
    axes = axes_of(2)
    rows = Layout.of(axes, {"data": Shard(0)})
    found, completed, local = collectives(program, axes, {x: rows}, {w: rows})
    assert found == ["all_gather"]
    assert completed.resting == {w, 2}
    (gather,) = [op for op in local.program.ops if op.name == "comm.all_gather"]
    value, layout = local.origin[gather.inputs[0]]
    assert (value, layout) == (2, Layout.of(axes, {"data": Shard(1)})), "gathered after transposing"
    assert dict(gather.kwargs)["value"] == f"x{w}"


def test_the_larger_operand_stays_where_it_is():
    graph = Graph()
    small, large = graph.input(4, 6), graph.input(6, 40)
    (y,) = graph.call("mm.default", Ref(small), Ref(large))
    program = graph.program([y])
    axes = axes_of(2)
    rows, columns = (Layout.of(axes, {"data": Shard(k)}) for k in (0, 1))
    found, _, local = collectives(program, axes, {small: rows, large: columns})
    assert found == ["all_gather"]
    assert local.origin[local.program.output("y0")][1] == columns


def test_a_gradient_owes_one_reduction_after_all_that_is_linear():
    graph = Graph()
    x, g = graph.input(6, 4), graph.input(6, 3)
    (turned,) = graph.call("t.default", Ref(x))
    (grad,) = graph.call("mm.default", Ref(turned), Ref(g))
    (other,) = graph.call("mul.Tensor", Ref(grad), 2.0)
    (both,) = graph.call("add.Tensor", Ref(grad), Ref(other))
    (delivered,) = graph.call("t.default", Ref(both))
    program = graph.program([delivered])
    axes = axes_of(3)
    rows = Layout.of(axes, {"data": Shard(0)})
    found, _, _ = collectives(program, axes, {x: rows, g: rows}, outputs={"y0": REPLICATED})
    assert found == ["all_reduce"]
    found, _, _ = collectives(program, axes, {x: rows, g: rows}, outputs={"y0": rows})
    assert found == ["reduce_scatter"]


def test_a_value_is_brought_once_for_all_its_readers():
    graph = Graph()
    x = graph.input(6, 4)
    (a,) = graph.call("tril.default", Ref(x))
    (b,) = graph.call("triu.default", Ref(x))
    program = graph.program([a, b])
    axes = axes_of(2)
    found, _, _ = collectives(program, axes, {x: Layout.of(axes, {"data": Shard(0)})})
    assert found == ["all_gather"]


@pytest.mark.parametrize("size", [7, 8])
def test_too_few_samples_for_the_ranks_stay_whole(size):
    graph = Graph()
    x = graph.input(7, 2)
    (y,) = graph.call("relu.default", Ref(x))
    axes = axes_of(size)
    rows = Layout.of(axes, {"data": Shard(0)})
    _, completed, _ = collectives(graph.program([y]), axes, {x: rows})
    assert bool(completed.carried[0]) == (size <= 7)
