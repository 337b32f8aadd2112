"""Rows keep their places, and travel to their experts: the same numbers, whoever has rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import meshwright.compile.experts  # noqa: F401 - registers ops
from meshwright.comm.base import Group
from meshwright.comm.local import run_local
from meshwright.compile.interpret import interpret
from meshwright.compile.random import RandomMode
from meshwright.compile.trace import Places, trace_function
from meshwright.errors import InternalError
from meshwright.plan.mesh import Axis, Mesh, StageMesh
from meshwright.program.dispatch import dispatched, routed
from meshwright.program.experts import unsorted_experts
from meshwright.program.layout import REPLICATED, Layout, Shard
from meshwright.program.partition import COLLECTIVES, Local, partition
from meshwright.program.program import Op, Ref
from meshwright.program.propagate import propagate
from tests.program.worlds import assert_holds, everywhere, local_parts, run_global

TOKENS, TIMES, EXPERTS, WIDTH, INNER = 12, 2, 3, 4, 8
ROWS = TOKENS * TIMES


def by_token(x, order):
    return x[order // TIMES]


def repeated(x, order):
    return x.repeat_interleave(TIMES, 0)[order]


def selected(x, order):
    return x.index_select(0, order // TIMES)


def by_inverse(rows, order):
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(ROWS)
    return rows[inverse].view(TOKENS, TIMES, -1).sum(1)


def by_second_sort(rows, order):
    return rows.index_select(0, order.argsort()).view(TOKENS, TIMES, -1).sum(1)


def by_adding(rows, order):
    return rows.new_zeros(TOKENS, WIDTH).index_add(0, order // TIMES, rows)


def mixture(gather, restore, *, stable=False, bias=False, mixed=False, summed=False):
    """Loss and gradients of a layer of experts as models write it."""

    def function(inputs):
        weights = {n: t for n, t in inputs.items() if t.is_floating_point()}
        named = {n: t.detach().requires_grad_() for n, t in weights.items()}
        x, up, down, scores = (named[n] for n in ("x", "up", "down", "scores"))
        ids, order = torch.sort(inputs["ids"], stable=stable)
        counts = torch.histc(ids.float(), EXPERTS, 0, EXPERTS - 1)
        ends = torch.cumsum(counts, 0, dtype=torch.int32)
        rows = torch.nn.functional.grouped_mm(gather(x, order), up, offs=ends)
        if bias:
            rows = rows + named["bias"][ids]
        if mixed:
            rows = rows.cumsum(0)
        rows = torch.tanh(rows) * (rows.sum(1, keepdim=True) if summed else rows)
        made = torch.nn.functional.grouped_mm(rows, down, offs=ends)
        out = restore(made * scores[order].unsqueeze(1), order)
        loss = (out * torch.sin(out)).sum()
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        pairs = zip(named, found, strict=True)
        return {"loss": loss, "out": out, **{n: g for n, g in pairs if g is not None}}

    return function


def tensors(seed, ids):
    generator = torch.Generator().manual_seed(seed)

    def some(*shape):
        return torch.rand(shape, dtype=torch.float64, generator=generator) - 0.5

    return {
        "x": some(TOKENS, WIDTH),
        "ids": torch.tensor(ids),
        "up": some(EXPERTS, WIDTH, INNER),
        "down": some(EXPERTS, INNER, WIDTH),
        "scores": some(ROWS),
        "bias": some(EXPERTS, INNER),
        "flat": some(ROWS, WIDTH),
        "others": torch.tensor(ids).roll(1),
    }


def traced(function):
    def under_mode(inputs):
        with RandomMode(lambda *_: torch.empty(0)):
            return function(inputs)

    with FakeTensorMode():
        given = tensors(0, [0] * ROWS)
        fakes = {n: torch.empty(t.shape, dtype=t.dtype) for n, t in given.items()}
    return trace_function(under_mode, fakes, Places(), lambda tensor: tensor)[0]


def bases(program):
    return [op.base for op in program.ops]


SORTED = {"aten.sort", "aten.histc", "meshwright.grouped_mm", "aten.index", "aten.index_select"}
GATHERS, RESTORES = (by_token, repeated, selected), (by_inverse, by_second_sort, by_adding)
some_ids = st.lists(st.integers(0, EXPERTS - 1), min_size=ROWS, max_size=ROWS)


@pytest.fixture(scope="module")
def plain():
    return traced(mixture(by_token, by_inverse))


def assert_same(program, changed, given_):
    before, after = run_global(program, given_), run_global(changed, given_)
    assert before.keys() == after.keys()
    for name, wanted in before.items():
        torch.testing.assert_close(after[name], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("restore", RESTORES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("gather", GATHERS, ids=lambda f: f.__name__)
def test_rows_are_left_where_they_are(gather, restore):
    program = traced(mixture(gather, restore, stable=gather is selected))
    changed = unsorted_experts(program)
    assert not SORTED & set(bases(changed))
    assert bases(changed).count("meshwright.expert_mm") == 4
    assert bases(changed).count("meshwright.expert_mm_weight") == 2
    assert_same(program, changed, tensors(1, [k * k % EXPERTS for k in range(ROWS)]))


@settings(max_examples=30, deadline=None)
@given(ids=some_ids, seed=st.integers(0, 99))
def test_any_ids_give_the_same_numbers(plain, ids, seed):
    assert_same(plain, unsorted_experts(plain), tensors(seed, ids))


@pytest.mark.parametrize("expert", range(EXPERTS))
def test_all_rows_may_go_to_one_expert(plain, expert):
    assert_same(plain, unsorted_experts(plain), tensors(2, [expert] * ROWS))


def test_biases_of_experts_follow_the_ids():
    program = traced(mixture(by_token, by_inverse, bias=True))
    changed = unsorted_experts(program)
    assert "aten.sort" not in bases(changed)
    assert_same(program, changed, tensors(3, [k % 2 * 2 for k in range(ROWS)]))


def test_a_program_whose_rows_depend_on_their_order_stays_as_it_was():
    program = traced(mixture(by_token, by_inverse, mixed=True))
    assert unsorted_experts(program) is program


def test_a_program_without_experts_stays_as_it_was(plain):
    small = replace(plain, ops=plain.ops[:1], outputs=())
    assert unsorted_experts(small) is small


# ── over the axis `expert` ───────────────────────────────────────────────────────────────────────


def cut(program, axes, *, split=True):
    """Every rank's program; tokens are split over all axes, weights of experts over `expert`."""
    rows = Layout.of(axes, {axis.name: Shard(0) for axis in axes if split})
    held = Layout.of(axes, {"expert": Shard(0)})
    pinned = {
        value: held if name in ("up", "down") else REPLICATED if name == "bias" else rows
        for name, value in program.inputs
    }
    completed = propagate(program, axes, pinned)
    wanted = dict.fromkeys(("x", "scores", "out", "flat"), rows) | {"up": held, "down": held}
    outputs = {name: wanted.get(name, REPLICATED) for name, _ in program.outputs}
    locals_ = [partition(program, completed, axes, here, outputs) for here in everywhere(axes)]
    return [routed(local, axes) for local in locals_], pinned, outputs


def check_everywhere(program, axes, given_, *, split=True):
    wanted = run_global(program, given_)
    locals_, pinned, outputs = cut(program, axes, split=split)
    mesh = Mesh((StageMesh(tuple(axes)),))
    parts = {n: local_parts(given_[n], pinned[v], axes) for n, v in program.inputs}
    exchanges = [
        interpret(
            local.program,
            {name: held[rank] for name, held in parts.items()},
            here,
            {axis.name: Group(axis.name, mesh.group(rank, axis.name)) for axis in axes},
        )
        for rank, (here, local) in enumerate(zip(everywhere(axes), locals_, strict=True))
    ]
    found = run_local(exchanges)
    for name, layout in outputs.items():
        assert_holds([rank[name] for rank in found], wanted[name], layout, axes, 1e-12)
    return [local.program for local in locals_]


@pytest.fixture(scope="module")
def sent(plain):
    return dispatched(unsorted_experts(plain))


MESHES = (
    (Axis("expert", 2),),
    (Axis("expert", 3),),
    (Axis("data", 2), Axis("expert", 2)),
)


@settings(max_examples=12, deadline=None)
@given(ids=some_ids, axes=st.sampled_from(MESHES))
def test_rows_travel_to_their_experts_and_back(sent, ids, axes):
    for program in check_everywhere(sent, axes, tensors(5, ids)):
        moved = [op for op in program.ops if op.name == "comm.exchange"]
        assert len(moved) == 4  # there and back, forward and backward


@pytest.mark.parametrize("expert", range(EXPERTS))
@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_a_rank_may_have_no_rows(sent, axes, expert):
    check_everywhere(sent, axes, tensors(6, [expert] * ROWS))


def test_sizes_among_arguments_are_of_the_rows_that_came():
    program = dispatched(unsorted_experts(traced(mixture(by_token, by_inverse, summed=True))))
    given_ = tensors(8, [k % 5 // 2 for k in range(ROWS)])
    programs = check_everywhere(program, MESHES[0], given_)
    assert [op.name for op in programs[0].ops].count("comm.exchange") == 4


def two_layers(inputs):
    """One expert for a row, one layer right after the other, and ids of their own."""
    x, up, down = (inputs[n].detach().requires_grad_() for n in ("flat", "up", "down"))
    out = x
    for name in ("ids", "others"):
        ids, order = torch.sort(inputs[name])
        counts = torch.histc(ids.float(), EXPERTS, 0, EXPERTS - 1)
        ends = torch.cumsum(counts, 0, dtype=torch.int32)
        rows = torch.tanh(torch.nn.functional.grouped_mm(out[order], up, offs=ends))
        rows = torch.nn.functional.grouped_mm(rows, down, offs=ends)
        out = out + rows[order.argsort()]
    loss = (out * torch.sin(out)).sum()
    found = torch.autograd.grad(loss, (x, up, down))
    return {"loss": loss, "out": out, **dict(zip(("flat", "up", "down"), found, strict=True))}


@settings(max_examples=6, deadline=None)
@given(ids=some_ids, axes=st.sampled_from(MESHES))
def test_layers_whose_rows_are_those_of_each_other(ids, axes):
    program = dispatched(unsorted_experts(traced(two_layers)))
    assert "aten.sort" not in bases(program)
    check_everywhere(program, axes, tensors(7, ids))


def test_nothing_else_of_the_rows_travels(sent):
    locals_, _, _ = cut(sent, MESHES[0])
    assert _moving_rows(locals_[0].program) == {"comm.exchange"}


def _moving_rows(program):
    """The collectives whose operands are as many as a rank's rows, or more."""
    return {
        op.name
        for op in program.ops
        if op.name in COLLECTIVES and program.values[op.inputs[0]].elements >= ROWS // 2
    }


def test_where_there_are_too_few_samples_weights_are_gathered(sent):
    given_ = tensors(9, [k % EXPERTS for k in range(ROWS)])
    programs = check_everywhere(sent, MESHES[0], given_, split=False)
    assert {op.name for op in programs[0].ops} & COLLECTIVES == {"comm.all_gather"}


def test_a_collective_may_not_cut_rows_that_were_dispatched(sent):
    (axes, here) = MESHES[0], {"expert": 0}
    rows = Layout.of(axes, {"expert": Shard(0)})
    pinned = {value: rows for name, value in sent.inputs if name in ("x", "ids", "scores")}
    local = partition(sent, propagate(sent, axes, pinned), axes, here, {})
    (first, *_) = (op for op in local.program.ops if op.base == "meshwright.dispatch")
    gather = Op("comm.all_gather", (Ref(first.results[0]), "data", (0, 1, 1, (0,), (1,))), (), (0,))
    program = replace(local.program, ops=(*local.program.ops, gather))
    with pytest.raises(InternalError, match=r"comm.all_gather of rows that were dispatched"):
        routed(Local(program, local.origin), axes)
