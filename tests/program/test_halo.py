"""Halos: windows over split dims compute what they do whole, and move edges only."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meshwright.plan.mesh import Axis
from meshwright.program.halo import spans
from meshwright.program.layout import REPLICATED, Layout, Shard
from meshwright.program.partition import COLLECTIVES
from meshwright.program.propagate import propagate
from meshwright.program.rules import rule_of
from meshwright.program.rules.factor import Halo
from tests.program.call import Call, f, program_of
from tests.program.samples import calls
from tests.program.worlds import assert_holds, give, run_everywhere, run_global

aten = torch.ops.aten


@st.composite
def windows(draw):
    """(halo, rows, rows made, parts)."""
    reach, stride = draw(st.integers(1, 7)), draw(st.integers(1, 4))
    padding, parts = draw(st.integers(0, reach)), draw(st.integers(2, 4))
    rows = draw(st.integers(parts, 20))
    made = (rows + 2 * padding - reach) // stride + 1
    return Halo(2, reach, stride, padding, 4), rows, made, parts


@given(case=windows())
def test_every_row_that_is_read_comes_from_the_one_who_holds_it(case):
    halo, rows, made, parts = case
    if made < parts:
        return
    found = spans(halo, rows, made, parts)
    assert sorted(n for a, b in found.held for n in range(a, b)) == list(range(rows))
    for reader, (low, high) in enumerate(found.read):
        shared = [found.shared(holder, reader) for holder in range(parts)]
        assert [n for a, b in shared for n in range(a, b)] == list(range(low, high))
    total = sum(
        high - low + sum(beyond)
        for (low, high), beyond in zip(found.read, found.beyond, strict=True)
    )
    assert total == made * halo.stride + parts * (halo.reach - halo.stride)


def convolutions():
    """Strides, dilations and kernels longer than what a rank holds; groups; no padding."""
    for label, (size, kernel, stride, padding, dilation) in {
        "strided": (9, 3, 2, 1, 1),
        "even": (8, 2, 2, 0, 1),
        "gaps": (9, 1, 2, 0, 1),
        "dilated": (9, 3, 1, 2, 2),
        "wide": (6, 5, 1, 2, 1),
        "bare": (8, 3, 1, 0, 1),
    }.items():
        step = ((stride,) * 2, (padding,) * 2, (dilation,) * 2, False, (0, 0))
        for groups in (1, 2):
            x, w = f(2, 4, size, size), f(6, 4 // groups, kernel, kernel)
            args = (x, w, f(6), *step, groups)
            yield Call("aten.convolution.default", args, label=f"{label} {groups}")
            grad = f(*aten.convolution.default(*args).shape)
            args = (grad, x, w, (6,), *step, groups, (True, True, True))
            yield Call("aten.convolution_backward.default", args, label=f"{label} {groups}")


def pools():
    """Overlapping windows, with padding."""
    x, window = f(2, 3, 9, 7), ((3, 3), (2, 2), (1, 1))
    out, places = aten.max_pool2d_with_indices.default(x, *window)
    grad = f(*out.shape)
    yield Call("aten.max_pool2d_with_indices.default", (x, *window), label="padded")
    args = (grad, x, *window, (1, 1), False, places)
    yield Call("aten.max_pool2d_with_indices_backward.default", args, label="padded")
    yield Call("aten.avg_pool2d.default", (x, *window), label="padded")
    args = (grad, x, *window, False, True, None)
    yield Call("aten.avg_pool2d_backward.default", args, label="padded")
    yield Call("aten.avg_pool2d.default", (x, *window, False, False), label="by what is there")
    yield Call("aten.avg_pool2d.default", (x, *window, True), label="ceil")


def every():
    spatial = ("convolution", "pool")
    known = [call for call in calls() if any(word in call.name for word in spatial)]
    return [*known, *convolutions(), *pools()]


def split_values(program, rule, axis):
    """(factor, value, layout) for all values that a rule lets the axis split over space."""
    (op,) = program.ops
    inside = [
        *zip(op.inputs, rule.operands, strict=True),
        *zip(op.results, rule.results, strict=True),
    ]
    for factor, _ in rule.halos:
        if rule.sizes[factor] >= axis.size:
            for value, dims in inside:
                if (factor,) in dims:
                    yield (
                        factor,
                        value,
                        Layout.of((axis,), {axis.name: Shard(dims.index((factor,)))}),
                    )


@pytest.mark.parametrize("call", every(), ids=str)
@pytest.mark.parametrize("size", [2, 3])
def test_an_op_split_over_space_computes_the_same(call, size):
    program, tensors = program_of(call)
    rule = rule_of(program.ops[0], program.values)
    expected = run_global(program, tensors)
    axis = Axis("context", size)
    for factor, value, layout in split_values(program, rule, axis):
        pinned = {value: layout}
        (carried,) = propagate(program, (axis,), pinned).carried
        assert [carry.factor for _, carry in carried] == [factor]
        found, laid, programs = run_everywhere(
            program, (axis,), give(program, tensors, (axis,)), {}, pinned
        )
        moves = {op.name for op in programs[0].ops if op.name in COLLECTIVES}
        assert moves == {"comm.all_to_all"}
        assert len({len(program.ops) for program in programs}) == 1
        for name, wanted in expected.items():
            assert_holds([rank[name] for rank in found], wanted, laid[name], (axis,), 1e-12)


def test_only_the_context_axis_goes_over_space():
    program, tensors = program_of(next(iter(convolutions())))
    axis = Axis("tensor", 2)
    value = program.ops[0].inputs[0]
    pinned = {value: Layout.of((axis,), {"tensor": Shard(2)})}
    assert propagate(program, (axis,), pinned).carried == ((),)
    found, _, _ = run_everywhere(
        program, (axis,), give(program, tensors, (axis,)), {"y0": REPLICATED}, pinned
    )
    torch.testing.assert_close(found[1]["y0"], run_global(program, tensors)["y0"])


@pytest.mark.parametrize("label", ["by what is there", "ceil"])
def test_what_counts_rows_that_are_not_there_stays_whole(label):
    call = next(call for call in pools() if call.label == label)
    program, _ = program_of(call)
    assert rule_of(program.ops[0], program.values).halos == ()


def test_edges_are_all_that_moves():
    x, w = f(2, 4, 12, 12), f(4, 4, 3, 3)
    step = ((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    program, tensors = program_of(Call("aten.convolution.default", (x, w, None, *step)))
    axis = Axis("context", 3)
    layout = Layout.of((axis,), {"context": Shard(2)})
    _, _, programs = run_everywhere(
        program, (axis,), give(program, tensors, (axis,)), {}, {0: layout}
    )
    for rank, rows in enumerate([(4, 1, 0), (1, 4, 1), (0, 1, 4)]):
        (move,) = [op for op in programs[rank].ops if op.name == "comm.all_to_all"]
        assert move.args[2][4] == rows
        assert dict(move.kwargs)["load"] == 2 * 4 * 6 * 12  # alike on all ranks: they share buckets
