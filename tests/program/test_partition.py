"""Partition: a rank's program has local shapes, says what it moves for whom, and moves little."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from meshwright.compile.draw import position_operand
from meshwright.program.layout import REPLICATED, Layout, Partial, Shard, local_shape
from meshwright.program.partition import COLLECTIVES, partition
from meshwright.program.program import Op, Program, Ref, Value
from meshwright.program.propagate import propagate
from tests.program.call import program_of
from tests.program.cases import annotated
from tests.program.graphs import Graph
from tests.program.samples import calls
from tests.program.worlds import axes_of, everywhere, give, held, run_everywhere, run_global


def cut(program, axes, pinned, outputs=None, stored=None, rank=0):
    completed = propagate(program, axes, pinned, stored)
    return partition(program, completed, axes, everywhere(axes)[rank], outputs or {})


@given(case=annotated())
def test_every_local_value_is_a_part_of_a_global_one(case):
    program, _, _, axes, pinned, stored, outputs = case
    completed = propagate(program, axes, pinned, stored)
    for here in everywhere(axes):
        local = partition(program, completed, axes, here, outputs)
        assert len(local.origin) == len(local.program.values)
        for value, (whole, layout) in zip(local.program.values, local.origin, strict=True):
            assert value.dtype == program.values[whole].dtype
            assert value.shape == local_shape(program.values[whole].shape, layout, axes, here)
            assert value.shape == held(program.values[whole].shape, layout, axes, here).shape


@given(case=annotated())
def test_ops_read_only_what_was_made_before(case):
    program, _, _, axes, pinned, stored, outputs = case
    local = cut(program, axes, pinned, outputs, stored).program
    known = {value for _, value in local.inputs}
    for op in local.ops:
        assert known.issuperset(op.inputs)
        assert known.isdisjoint(op.results)
        known.update(op.results)
    assert known.issuperset(value for _, value in local.outputs)


@given(case=annotated())
def test_no_value_is_moved_twice_the_same_way(case):
    """All readers in one module and phase share what was brought."""
    program, _, _, axes, pinned, stored, outputs = case
    local = cut(program, axes, pinned, outputs, stored)
    moves = [
        (local.origin[op.results[0]], op.phase, op.module)
        for op in local.program.ops
        if op.name.startswith("comm.")
    ]
    assert len(set(moves)) == len(moves)


def test_moves_name_the_weight_the_layouts_and_the_reader():
    axes = axes_of(2)
    rows = Layout.of(axes, {"data": Shard(0)})
    values = tuple(Value("float64", shape) for shape in ((6, 4), (8, 4), (4, 8), (6, 8)))
    program = Program(
        values,
        (("batch/x", 0), ("model/w", 1)),
        (
            Op("aten.t.default", (Ref(1),), (), (2,), module="head", source="m.py:7"),
            Op("aten.mm.default", (Ref(0), Ref(2)), (), (3,), module="head", source="m.py:7"),
        ),
        (("y", 3),),
    )
    local = cut(program, axes, {0: rows}, {}, {1: rows})
    (gather,) = [op for op in local.program.ops if op.name in COLLECTIVES]
    assert gather.name == "comm.all_gather"
    assert dict(gather.kwargs) == {
        "before": "sharded(1) over data",
        "after": "replicated",
        "value": "model/w",
        "load": 32,  # elements, were shards even
    }
    assert (gather.module, gather.source, gather.phase) == ("head", "m.py:7", "forward")


def test_a_stored_weight_is_gathered_again_for_the_backward_pass_and_for_each_module():
    axes = axes_of(2)
    rows = Layout.of(axes, {"data": Shard(0)})
    values = tuple(Value("float64", (4, 4)) for _ in range(6))
    ops = tuple(
        Op("aten.mm.default", (Ref(0), Ref(1)), (), (2 + k,), phase=phase, module=module)
        for k, (phase, module) in enumerate(
            [("forward", "a"), ("forward", "a"), ("forward", "b"), ("backward", "a")]
        )
    )
    outputs = tuple((f"y{k}", 2 + k) for k in range(4))
    program = Program(values, (("x", 0), ("w", 1)), ops, outputs)
    local = cut(program, axes, {0: rows}, {}, {1: rows})
    found = [(op.phase, op.module) for op in local.program.ops if op.name in COLLECTIVES]
    assert found == [("forward", "a"), ("forward", "b"), ("backward", "a")]


def test_a_sum_that_several_read_is_paid_once():
    graph = Graph()
    x, w = graph.input(4, 6), graph.input(6, 4)
    (y,) = graph.call("mm.default", Ref(x), Ref(w))
    (a,) = graph.call("relu.default", Ref(y))
    (b,) = graph.call("tanh.default", Ref(y))
    axes = axes_of(2)
    pinned = {x: Layout.of(axes, {"data": Shard(1)})}
    local = cut(graph.program([a, b, y]), axes, pinned)
    assert [op.name for op in local.program.ops if op.name in COLLECTIVES] == ["comm.all_reduce"]


def test_a_delivered_layout_is_kept_where_it_is_not_named():
    graph = Graph()
    x = graph.input(4, 6)
    (y,) = graph.call("sum.dim_IntList", Ref(x), [0], False)
    axes = axes_of(2)
    local = cut(graph.program([y]), axes, {x: Layout.of(axes, {"data": Shard(0)})})
    assert local.origin[local.program.output("y0")][1] == Layout.of(axes, {"data": Partial()})
    assert not any(op.name in COLLECTIVES for op in local.program.ops)


def draws():
    return [call for call in calls() if call.base == "meshwright.draw" and call.args[3] >= 0]


@given(call=st.sampled_from(draws()), sizes=st.sampled_from([(2,), (3,), (2, 2)]))
def test_ranks_draw_their_own_samples_of_one_sequence(call, sizes):
    program, tensors = program_of(call)
    axes = axes_of(*sizes)
    split = Shard(*call.args[3:6])
    result = program.output("y0")
    layout = Layout.of(axes, {axis.name: split for axis in axes})
    expected = run_global(program, tensors)["y0"]
    found, laid, programs = run_everywhere(
        program, axes, give(program, tensors, axes), {}, {result: layout, 0: REPLICATED}
    )
    assert not any(op.name in COLLECTIVES for op in programs[0].ops)
    assert laid["y0"] == layout
    for here, rank in zip(everywhere(axes), found, strict=True):
        index = torch.from_numpy(held(expected.shape, layout, axes, here))
        assert torch.equal(rank["y0"], expected.reshape(-1)[index])


def test_a_draw_within_a_program_is_cut_with_its_samples():
    """Dropout: the mask follows the activations that it is multiplied with."""
    position = position_operand(1, 16, 0, 0)
    values = (
        Value("float64", (5, 4)), Value("int64", (5,)), Value("float32", (5, 4)),
        Value("float64", (5, 4)),
    )  # fmt: skip
    draw = ("uniform", (5, 4), 0, 0, 1, 1, 0, Ref(1))
    ops = (
        Op("meshwright.draw.default", draw, (), (2,)),
        Op("aten.mul.Tensor", (Ref(0), Ref(2)), (), (3,)),
    )
    program = Program(values, (("x", 0), ("position", 1)), ops, (("y", 3),))
    tensors = {"x": torch.ones(5, 4, dtype=torch.float64), "position": position}
    axes = axes_of(2)
    rows = Layout.of(axes, {"data": Shard(0)})
    found, _, programs = run_everywhere(
        program, axes, give(program, tensors, axes), {"y": REPLICATED}, {0: rows, 1: REPLICATED}
    )
    assert programs[1].values[2].shape == (2, 4)
    assert all(torch.equal(rank["y"], run_global(program, tensors)["y"]) for rank in found)
