"""Instruction lists: they compute what their program does, and free each value once, in time."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.comm.base import Group, Wait
from meshwright.comm.local import run_local
from meshwright.compile.collective import start, unpack, wire
from meshwright.compile.lower import lower
from meshwright.plan.mesh import Mesh, StageMesh
from meshwright.program.bucket import BUCKET_BYTES
from meshwright.program.instruction import Instruction
from meshwright.program.layout import REPLICATED, Layout, Shard
from meshwright.program.overlap import overlapped
from meshwright.program.partition import COLLECTIVES, partition
from meshwright.program.pieces import Table, pieces, run_pieces, segments_of
from meshwright.program.program import Op, Program, Ref, Value
from meshwright.program.propagate import propagate
from tests.program.cases import annotated
from tests.program.graphs import Graph, close
from tests.program.worlds import assert_holds, axes_of, everywhere, local_parts

LIMITS = st.sampled_from([1, 100, BUCKET_BYTES])
"""Bytes of a bucket: one collective each, a few, as many as there are."""


def check(instructions, given_, kept):
    """What is wrong with a list: reads of what is not there, frees too early, twice or never.

    A Start's operand must live until its Wait: the transport reads it meanwhile.
    """
    there, gone, reading, problems = set(given_), set(), {}, []
    for instruction in instructions:
        if instruction.kind == "Free":
            found = check_free(instruction, there, gone, reading, {*given_, *kept})
            problems += [f"{instruction}: {problem}" for problem in found]
            there -= set(instruction.inputs)
            gone |= set(instruction.inputs)
            continue
        reads, makes = set(instruction.inputs), set(instruction.outputs)
        problems += [f"{instruction}: {v} is not there" for v in reads - there]
        problems += [f"{instruction}: {v} is made twice" for v in makes & there]
        there |= makes
        if instruction.kind == "Start":
            reading[instruction.outputs[0]] = instruction.inputs
        if instruction.kind == "Wait":
            reading.pop(instruction.inputs[0], None)
            there -= reads
    problems += [f"{value} is never waited for" for value in reading]
    problems += [f"{value} is never freed" for value in there - {*given_, *kept}]
    return problems + [f"{value} is not there at the end" for value in kept if value not in there]


def check_free(free, there, gone, reading, others):
    """What is wrong with one Free."""
    busy = {value for held in reading.values() for value in held}
    for value in free.inputs:
        if value in gone:
            yield f"{value} is freed twice"
        if value not in there | gone:
            yield f"{value} was never made"
        if value in busy:
            yield f"{value} is read by a Start that nobody waited for"
        if value in others:
            yield f"{value} is not its to free"


def execute(instructions, segments, calls, values, coordinates, groups):
    """A second, plain executor: an exchange that returns what is left."""
    functions = [lower(segment, coordinates) for segment in segments]
    for instruction in instructions:
        if instruction.kind == "Run":
            made = functions[instruction.segment](*[values[name] for name in instruction.inputs])
            values.update(zip(instruction.outputs, made, strict=True))
        elif instruction.kind == "Start":
            call, axis = wire(calls[instruction.segment]), instruction.axis
            operands = [values[name] for name in instruction.inputs]
            request = start(call, operands, groups[axis], coordinates[axis])
            values[instruction.outputs[0]] = yield request
        elif instruction.kind == "Wait":
            handle = values.pop(instruction.inputs[0])
            results = unpack(wire(calls[instruction.segment]), (yield Wait(handle)))
            values.update(zip(instruction.outputs, results, strict=True))
        elif instruction.kind == "Free":
            for name in instruction.inputs:
                del values[name]
    return values


def built(program, axes, pinned, stored, outputs, limit=BUCKET_BYTES):
    """Per rank: (its program, its list, its table)."""
    completed = propagate(program, axes, pinned, stored)
    for here in everywhere(axes):
        local = overlapped(partition(program, completed, axes, here, outputs).program, limit)
        table = Table()
        yield completed, local, run_pieces(local, table, 0, {}, limit=limit), table


def delivered(local):
    """Output name -> name of its value."""
    inputs = {value: name for name, value in local.inputs}
    return {name: inputs.get(value, f"0:{value}") for name, value in local.outputs}


@settings(max_examples=100)
@given(case=annotated(), limit=LIMITS)
def test_lists_are_sound(case, limit):
    program, _, _, axes, pinned, stored, outputs = case
    for _, local, found, table in built(program, axes, pinned, stored, outputs, limit):
        names = [name for name, _ in local.inputs]
        assert check(found, names, delivered(local).values()) == []
        kinds = Counter(instruction.kind for instruction in found)
        collectives = sum(op.name in COLLECTIVES for op in local.ops)
        assert kinds["Start"] == kinds["Wait"] == len(table.calls)
        assert sum(map(len, table.calls)) == collectives
        assert set(kinds) <= {"Run", "Start", "Wait", "Free"}


@settings(max_examples=60)
@given(case=annotated(), limit=LIMITS)
def test_lists_compute_what_the_program_does(case, limit):
    program, given_, tensors, axes, pinned, stored, outputs = case
    mesh = Mesh((StageMesh(tuple(axes)),))
    lists = list(built(program, axes, pinned, stored, outputs, limit))
    exchanges = []
    for rank, (completed, _, found, table) in enumerate(lists):
        here = everywhere(axes)[rank]
        groups = {axis.name: Group(axis.name, mesh.group(rank, axis.name)) for axis in axes}
        values = {
            name: local_parts(given_[name], layout, axes, k)[rank]
            for k, ((name, _), layout) in enumerate(
                zip(program.inputs, completed.inputs, strict=True)
            )
        }
        exchanges.append(execute(found, table.segments, table.calls, values, here, groups))
    left = run_local(exchanges)
    laid = _layouts(program, lists[0][0], axes, outputs)
    for name, value in program.outputs:
        parts = [
            rank[delivered(local)[name]] for rank, (_, local, _, _) in zip(left, lists, strict=True)
        ]
        assert_holds(parts, tensors[value], laid[name], axes, close(*tensors))


def _layouts(program, completed, axes, outputs):
    local = partition(program, completed, axes, everywhere(axes)[0], outputs)
    return {name: local.origin[value][1] for name, value in local.program.outputs}


@given(case=annotated(), limit=LIMITS)
def test_pieces_keep_every_op_in_an_order_that_can_run(case, limit):
    program, _, _, axes, pinned, stored, outputs = case
    for _, local, _, _ in built(program, axes, pinned, stored, outputs, limit):
        cut = pieces(local, limit)
        ran = [op for piece in cut if piece.kind != "wait" for op in piece.ops]
        assert Counter(map(id, ran)) == Counter(map(id, local.ops))
        known = {value for _, value in local.inputs}
        for piece in cut:
            for op in piece.ops:
                assert piece.kind == "wait" or known.issuperset(op.inputs)
                if piece.kind != "start":
                    known.update(op.results)


@given(case=annotated(), limit=LIMITS)
def test_every_rank_starts_the_same_collectives_in_the_same_order(case, limit):
    program, _, _, axes, pinned, stored, outputs = case
    found = [
        [
            (i.axis, [op.name for op in table.calls[i.segment]])
            for i in instructions
            if i.kind == "Start"
        ]
        for _, _, instructions, table in built(program, axes, pinned, stored, outputs, limit)
    ]
    assert all(starts == found[0] for starts in found)


# ── by example ───────────────────────────────────────────────────────────────────────────────────


def two_layers():
    """y = (x w0) w1 with both weights stored in shards."""
    graph = Graph()
    x, w0, w1 = graph.input(4, 6), graph.input(6, 6), graph.input(6, 6)
    (h,) = graph.call("mm.default", Ref(x), Ref(w0))
    (y,) = graph.call("mm.default", Ref(h), Ref(w1))
    axes = axes_of(2)
    rows = Layout.of(axes, {"data": Shard(0)})
    program = graph.program([y])
    completed = propagate(program, axes, {x: rows}, {w0: rows, w1: rows})
    return partition(program, completed, axes, {"data": 0}, {}).program


def test_a_gather_is_started_before_what_runs_meanwhile():
    table = Table()
    program = overlapped(two_layers(), limit=1)
    found = run_pieces(program, table, 3, {"x0": "3:batch/x"}, "unit ", limit=1)
    assert [i.kind for i in found if i.kind != "Free"] == [
        "Start", "Start", "Wait", "Run", "Wait", "Run",
    ]  # fmt: skip
    assert found[0].inputs == ("x1",)
    assert found[0].axis == "data"
    assert all(i.microbatch == 3 for i in found)
    run = next(i for i in found if i.kind == "Run")
    assert run.inputs[0] == "3:batch/x"
    assert run.outputs[0].startswith("unit 3:")
    assert len(table.segments) == 1, "equal layers are one segment"
    assert len(table.calls) == 2


def test_an_instruction_says_what_it_does():
    wait = Instruction("Wait", 2, 1, 0, ("~a",), ("a",), "data")
    assert str(wait) == "Wait 2 @1 over data: ~a -> a"
    assert str(Instruction("Free", inputs=("a", "b"))) == "Free: a, b -> "


def test_segments_are_numbered_in_order_of_use():
    values = tuple(Value("float64", (k + 1,)) for k in range(9))
    ops = (
        Op("aten.mul.Tensor", (Ref(7), Ref(3)), (), (5,)),
        Op("aten.neg.default", (Ref(5),), (), (8,)),
    )
    program = Program(values, (), ops, ())
    segment, reads, gives = segments_of(program, ops, frozenset({8}))
    assert (reads, gives) == ((7, 3), (8,))
    assert segment.inputs == (("i0", 0), ("i1", 1))
    assert [op.inputs for op in segment.ops] == [(0, 1), (2,)]
    assert segment.outputs == (("o0", 3),)
    assert [value.shape for value in segment.values] == [(8,), (4,), (6,), (9,)]


def test_an_input_that_is_delivered_is_neither_copied_nor_freed():
    program = Program((Value("float64", (2,)),), (("x", 0),), (), (("y", 0),))
    assert run_pieces(program, Table(), 0, {}) == ()


def test_a_collective_nobody_reads_is_waited_for():
    values = (Value("float64", (4,)), Value("float64", (4,)))
    reduce = Op("comm.all_reduce", (Ref(0), "data", "sum"), (), (1,))
    found = run_pieces(Program(values, (("x", 0),), (reduce,), ()), Table(), None, {})
    assert [i.kind for i in found] == ["Start", "Wait", "Free"]
    assert check(found, ["x"], []) == []


@pytest.mark.parametrize("broken", range(5))
def test_the_checker_finds_broken_lists(broken):
    """The checks above must be able to fail."""
    found = list(run_pieces(two_layers(), Table(), 0, {}))
    last = next(i for i in reversed(found) if i.kind == "Run").outputs
    names = ["x0", "x1", "x2"]
    assert check(found, names, last) == []
    frees = [k for k, i in enumerate(found) if i.kind == "Free"]
    waits = [k for k, i in enumerate(found) if i.kind == "Wait"]
    match broken:
        case 0:
            del found[frees[0]]
        case 1:
            found.insert(frees[0], found[frees[0]])
        case 2:
            found.insert(0, found.pop(frees[-1]))
        case 3:
            del found[waits[0]]
        case 4:
            found.append(Instruction("Free", inputs=("x0",)))
    assert check(found, names, last) != []


def test_a_free_before_the_wait_is_found():
    values = tuple(Value("float64", (4,)) for _ in range(3))
    ops = (
        Op("aten.neg.default", (Ref(0),), (), (1,)),
        Op("comm.all_reduce", (Ref(1), "data", "sum"), (), (2,)),
    )
    found = list(run_pieces(Program(values, (("x", 0),), ops, (("y", 2),)), Table(), 0, {}))
    assert [i.kind for i in found] == ["Run", "Start", "Wait", "Free"]
    assert check(found, ["x"], ["0:2"]) == []
    found[2:] = reversed(found[2:])
    assert any("nobody waited for" in problem for problem in check(found, ["x"], ["0:2"]))


def test_lists_of_two_ranks_gather_their_weights():
    graph = Graph()
    x, w = graph.input(4, 6), graph.input(6, 5)
    (y,) = graph.call("mm.default", Ref(x), Ref(w))
    program, axes = graph.program([y]), axes_of(2)
    rows = Layout.of(axes, {"data": Shard(0)})
    exchanges = []
    for rank, (completed, _, found, table) in enumerate(
        built(program, axes, {x: rows}, {w: rows}, {"y0": REPLICATED})
    ):
        values = {
            name: local_parts(graph.given()[name], layout, axes)[rank]
            for (name, _), layout in zip(program.inputs, completed.inputs, strict=True)
        }
        group = {"data": Group("data", (0, 1))}
        exchanges.append(execute(found, table.segments, table.calls, values, {"data": rank}, group))
    for left in run_local(exchanges):
        (made,) = [tensor for name, tensor in left.items() if name.startswith("0:")]
        torch.testing.assert_close(made, graph.tensors[y], rtol=1e-14, atol=1e-14)
