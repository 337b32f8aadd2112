"""Sums over ranks in float32: narrowing casts pay before, widening ones let partial sums pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meshwright.program.layout import REPLICATED, Layout, Partial, Shard
from meshwright.program.partition import COLLECTIVES, partition
from meshwright.program.program import Op, Program, Ref, Symbol, Value
from meshwright.program.propagate import propagate
from meshwright.program.widen import sums_short, with_wide_sums
from tests.program.worlds import axes_of, everywhere, run_everywhere

ROWS, COLUMNS = 6, 4


def cast(value, result, dtype):
    return Op(
        "aten._to_copy.default", (Ref(value),), (("dtype", Symbol("dtype", dtype)),), (result,)
    )


def summed(before, after):
    """x (6, 4) of one dtype, summed over its rows and cast to the other."""
    values = (Value(before, (ROWS, COLUMNS)), Value(before, (COLUMNS,)), Value(after, (COLUMNS,)))
    ops = (Op("aten.sum.dim_IntList", (Ref(0), (0,)), (), (1,)), cast(1, 2, after))
    return Program(values, (("x", 0),), ops, (("y", 2),))


def cut(program, ranks=2, outputs=None, stored=None):
    axes = axes_of(ranks)
    rows = Layout.of(axes, {"data": Shard(0)})
    first = program.inputs[0][1]
    completed = propagate(program, axes, {first: rows}, stored)
    local = partition(program, completed, axes, everywhere(axes)[0], outputs or {})
    return local.program


def kinds(program):
    """(op, dtype of what it reads) of the collectives."""
    return [
        (op.name, program.values[op.inputs[0]].dtype)
        for op in program.ops
        if op.name in COLLECTIVES
    ]


def test_a_narrowing_cast_pays_first_in_the_wider_dtype():
    local = cut(summed("float32", "bfloat16"), outputs={"y": REPLICATED})
    assert [op.name for op in local.ops] == [
        "aten.sum.dim_IntList", "comm.all_reduce", "aten._to_copy.default",
    ]  # fmt: skip
    assert kinds(local) == [("comm.all_reduce", "float32")]


def test_a_widening_cast_lets_a_partial_sum_pass():
    local = cut(summed("bfloat16", "float32"), outputs={"y": REPLICATED})
    assert kinds(local) == [("comm.all_reduce", "float32")]
    assert [op.name for op in local.ops] == [
        "aten.sum.dim_IntList", "aten._to_copy.default", "comm.all_reduce",
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("target", "op"), [(None, "all_reduce"), (Shard(0), "reduce_scatter")])
def test_what_is_owed_in_16_bits_is_widened_reduced_and_narrowed(dtype, target, op):
    program = summed(dtype, dtype)
    to = Layout.of(axes_of(2), {"data": target})
    local = cut(program, outputs={"y": to})
    assert kinds(local) == [(f"comm.{op}", "float32")]
    assert local.values[local.output("y")].dtype == dtype
    assert not any(sums_short(each, local) for each in local.ops)


def test_maxima_stay_as_they_are():
    values = (Value("bfloat16", (ROWS, COLUMNS)), Value("bfloat16", (COLUMNS,)))
    ops = (Op("aten.amax.default", (Ref(0), (0,)), (), (1,)),)
    local = cut(Program(values, (("x", 0),), ops, (("y", 1),)), outputs={"y": REPLICATED})
    assert kinds(local) == [("comm.all_reduce", "bfloat16")]


def test_counts_become_floats_before_they_are_summed():
    """Integers are exact either way, and the sum of one scalar costs what that of another does."""
    local = cut(summed("int64", "float32"), outputs={"y": REPLICATED})
    assert kinds(local) == [("comm.all_reduce", "float32")]


def test_a_stored_weight_is_cast_where_it_lies_and_gathered_short():
    axes = axes_of(2)
    shard = Layout.of(axes, {"data": Shard(0)})
    values = (
        Value("bfloat16", (8, COLUMNS)), Value("float32", (ROWS, COLUMNS)),
        Value("bfloat16", (ROWS, COLUMNS)), Value("bfloat16", (COLUMNS, ROWS)),
        Value("bfloat16", (8, ROWS)),
    )  # fmt: skip
    ops = (
        cast(1, 2, "bfloat16"),
        Op("aten.t.default", (Ref(2),), (), (3,)),
        Op("aten.mm.default", (Ref(0), Ref(3)), (), (4,)),
    )
    program = Program(values, (("batch/x", 0), ("model/w", 1)), ops, (("y", 4),))
    local = cut(program, stored={1: shard})
    assert kinds(local) == [("comm.all_gather", "bfloat16")]
    assert local.values[local.input("model/w")].dtype == "float32"


@given(
    dtypes=st.lists(st.sampled_from(["bfloat16", "float16", "float32"]), min_size=1, max_size=5),
    ranks=st.integers(2, 4),
    end=st.sampled_from(
        [REPLICATED, Layout((("data", Shard(0)),)), Layout((("data", Partial()),))]
    ),
)
def test_no_program_sums_16_bit_values_over_ranks(dtypes, ranks, end):
    """Whatever casts a partial sum goes through, and wherever it ends."""
    values = [Value(dtypes[0], (ROWS, COLUMNS)), Value(dtypes[0], (COLUMNS,))]
    ops = [Op("aten.sum.dim_IntList", (Ref(0), (0,)), (), (1,))]
    for dtype in dtypes[1:]:
        values.append(Value(dtype, (COLUMNS,)))
        ops.append(cast(len(values) - 2, len(values) - 1, dtype))
    program = Program(tuple(values), (("x", 0),), tuple(ops), (("y", len(values) - 1),))
    local = cut(program, ranks, {"y": end})
    assert not any(sums_short(op, local) for op in local.ops)
    assert with_wide_sums(local) == (local, ())


def test_a_sum_of_many_ranks_is_rounded_once():
    axes = axes_of(4)
    program = summed("bfloat16", "bfloat16")
    values = (Value("bfloat16", (4, COLUMNS)), *program.values[1:])
    terms = torch.tensor([256.0, 1.0, 1.0, 1.0], dtype=torch.bfloat16)

    def row(_layouts, rank):
        return {"x": terms[rank].expand(1, COLUMNS)}

    pinned = {0: Layout.of(axes, {"data": Shard(0)})}
    found, _, _ = run_everywhere(
        replace(program, values=values), axes, row, {"y": REPLICATED}, pinned
    )
    for outputs in found:
        assert outputs["y"].tolist() == [260.0] * COLUMNS  # one by one, 256 + 1 is 256 in bf16
