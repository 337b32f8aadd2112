"""Reshards: any layout becomes any other on real tensors, and by the cheapest steps."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.program.layout import REPLICATED, Layout, Partial, Shard
from meshwright.program.partition import COLLECTIVES
from meshwright.program.program import Program, Value
from meshwright.program.reshard import Step, _kind, _legal, reshard, step_cost
from tests.program.worlds import (
    assert_holds,
    axes_of,
    everywhere,
    factored,
    give,
    layouts,
    meshes,
    part,
    run_everywhere,
)

reductions = st.sampled_from(["sum", "max", "min"])


@st.composite
def cases(draw, partial_goal=True):
    axes = draw(meshes())
    shape, shards = draw(factored())
    before = draw(layouts(axes, shards, draw(reductions)))
    after = draw(layouts(axes, shards, draw(reductions) if partial_goal else None))
    kept = {p for name, p in before.placements if isinstance(p, Partial) and after.on(name) == p}
    owed = {p for _, p in (*before.placements, *after.placements) if isinstance(p, Partial)}
    if kept and len(owed) > 1:
        after = Layout(tuple((n, p) for n, p in after.placements if isinstance(p, Shard)))
    return shape, axes, before, after


def passing(shape):
    """A program that does nothing."""
    return Program((Value("float64", shape),), (("x", 0),), (), (("y", 0),))


def numbers(shape):
    """Whole numbers, so that sums are exact in any order."""
    return torch.arange(1, math.prod(shape) + 1, dtype=torch.float64).reshape(shape)


@settings(max_examples=200)
@given(case=cases())
def test_any_layout_becomes_any_other(case):
    shape, axes, before, after = case
    x = numbers(shape)
    program = passing(shape)
    found, laid, _ = run_everywhere(
        program, axes, give(program, {"x": x}, axes), {"y": after}, {0: before}
    )
    assert laid["y"] == after
    assert_holds([rank["y"] for rank in found], x, after, axes)


@given(axes=meshes(), found=factored(), op=reductions)
def test_what_becomes_partial_is_kept_at_coordinate_0(axes, found, op):
    shape, _ = found
    program, x = passing(shape), numbers(shape)
    after = Layout.of(axes, {axes[-1].name: Partial(op)})
    outputs, _, programs = run_everywhere(
        program, axes, give(program, {"x": x}, axes), {"y": after}, {0: REPLICATED}
    )
    neutral = {"sum": 0.0, "max": -math.inf, "min": math.inf}[op]
    for here, rank in zip(everywhere(axes), outputs, strict=True):
        wanted = x if here[axes[-1].name] == 0 else torch.full_like(x, neutral)
        assert torch.equal(rank["y"], wanted)
    assert not any(op.name in COLLECTIVES for op in programs[0].ops)


@given(axes=meshes(), found=factored(), data=st.data())
def test_what_all_hold_is_cut_without_a_collective(axes, found, data):
    shape, shards = found
    after = data.draw(layouts(axes, shards))
    program, x = passing(shape), numbers(shape)
    outputs, _, programs = run_everywhere(
        program, axes, give(program, {"x": x}, axes), {"y": after}, {0: REPLICATED}
    )
    assert_holds([rank["y"] for rank in outputs], x, after, axes)
    assert {op.name for op in programs[0].ops} <= {"comm.slice"}


@given(case=cases())
def test_steps_follow_on_one_another_and_each_is_of_one_axis(case):
    shape, axes, before, after = case
    steps = reshard(shape, axes, before, after)
    here = before
    for step in steps:
        assert step.before == here
        changed = [a.name for a in axes if step.before.on(a.name) != step.after.on(a.name)]
        assert changed == [step.axis]
        here = step.after
    assert here == after
    assert steps == reshard(shape, axes, before, after)


def cheapest(shape, axes, before, after, depth):
    """The least cost over every sequence of at most `depth` steps between these placements."""
    if before == after:
        return 0.0
    if depth == 0:
        return math.inf
    best = math.inf
    for axis in axes:
        here = before.on(axis.name)
        for there in {None, after.on(axis.name)} - {here}:
            kind = _kind(here, there)
            if kind and _legal(shape, axes, before, axis.name, here, there):
                step = Step(kind, axis.name, before, before.change(axes, axis.name, there))
                rest = cheapest(shape, axes, step.after, after, depth - 1)
                best = min(best, step_cost(shape, axes, step) + rest)
    return best


@given(case=cases())
def test_no_short_sequence_is_cheaper(case):
    shape, axes, before, after = case
    steps = reshard(shape, axes, before, after)
    cost = sum(step_cost(shape, axes, step) for step in steps)
    assert cost <= cheapest(shape, axes, before, after, 4) + 1e-2


def kinds(shape, axes, before, after):
    return [(step.kind, step.axis) for step in reshard(shape, axes, before, after)]


def test_well_known_moves():
    axes = axes_of(2, 2)
    rows, columns = (Layout.of(axes, {"data": Shard(k)}) for k in (0, 1))
    owed = Layout.of(axes, {"data": Partial()})
    shape = (8, 8)
    assert kinds(shape, axes, rows, rows) == []
    assert kinds(shape, axes, rows, REPLICATED) == [("all_gather", "data")]
    assert kinds(shape, axes, rows, columns) == [("all_to_all", "data")]
    assert kinds(shape, axes, owed, REPLICATED) == [("all_reduce", "data")]
    assert kinds(shape, axes, owed, rows) == [("reduce_scatter", "data")]
    assert kinds(shape, axes, REPLICATED, owed) == [("mask", "data")]
    assert kinds(shape, axes, rows, owed) == [("all_gather", "data"), ("mask", "data")]
    both = Layout.of(axes, {"data": Shard(0), "context": Shard(0)})
    assert kinds(shape, axes, both, REPLICATED) == [
        ("all_gather", "context"),
        ("all_gather", "data"),
    ]
    crossed = Layout.of(axes, {"data": Partial(), "context": Shard(0)})
    assert kinds(shape, axes, crossed, Layout.of(axes, {"data": Shard(1)})) == [
        ("reduce_scatter", "data"),
        ("all_gather", "context"),
    ]


def test_a_whole_reduction_scatters_before_it_gathers_the_rest():
    """Fewer bytes: the reduction is done while the other dim is still a shard."""
    axes = axes_of(2, 2)
    before = Layout.of(axes, {"data": Partial(), "context": Shard(0)})
    assert kinds((8, 8), axes, before, REPLICATED) == [
        ("all_reduce", "data"),
        ("all_gather", "context"),
    ]


def test_bytes_are_counted_by_what_a_rank_receives():
    axes = axes_of(4)
    rows = Layout.of(axes, {"data": Shard(0)})
    owed = Layout.of(axes, {"data": Partial()})

    def cost(before, after):
        (step,) = reshard((8, 8), axes, before, after)
        return step_cost((8, 8), axes, step)

    assert cost(rows, REPLICATED) == 48
    assert cost(owed, REPLICATED) == 96
    assert cost(owed, rows) == 48
    assert cost(rows, Layout.of(axes, {"data": Shard(1)})) == 12
    assert cost(REPLICATED, rows) == 0


def test_whole_numbers_and_truth_values_move_too():
    axes = axes_of(2)
    rows = Layout.of(axes, {"data": Shard(0)})
    for dtype in ("int64", "bool", "bfloat16"):
        program = Program((Value(dtype, (5,)),), (("x", 0),), (), (("y", 0),))
        x = torch.tensor([1, 0, 1, 1, 0]).to(getattr(torch, dtype))
        found, _, _ = run_everywhere(
            program, axes, give(program, {"x": x}, axes), {"y": REPLICATED}, {0: rows}
        )
        assert all(torch.equal(rank["y"], x) for rank in found)
        assert torch.equal(part(x, rows, axes, {"data": 1}), x[3:])
