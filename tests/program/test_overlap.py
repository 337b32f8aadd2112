"""Order and buckets: what moves, how far, and that a rank still does the same."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from meshwright.program.bucket import buckets, kind_of, load_of
from meshwright.program.layout import Layout, Shard
from meshwright.program.overlap import overlapped
from meshwright.program.partition import COLLECTIVES, partition
from meshwright.program.pieces import pieces
from meshwright.program.program import Op, Program, Ref, Value
from meshwright.program.propagate import propagate
from meshwright.program.repeat import repeated
from tests.program.cases import annotated
from tests.program.worlds import axes_of, everywhere

ELEMENT = 8


def gather(operand, result, phase="forward"):
    return Op("comm.all_gather", (Ref(operand), "data", (0, 1, 1, (0, 2), (2, 2))), (), (result,),
              phase=phase)  # fmt: skip


def reduce(operand, result, how="sum"):
    return Op("comm.all_reduce", (Ref(operand), "data", how), (), (result,), phase="finish")


def compute(*operands, result, module=""):
    args = tuple(Ref(operand) for operand in operands)
    return Op("aten.mm.default", args, (), (result,), module=module)


def program(ops, count, inputs, outputs=()):
    values = tuple(Value("float64", (4,)) for _ in range(count))
    named = tuple((f"x{k}", k) for k in range(inputs))
    return Program(values, named, tuple(ops), tuple((f"y{k}", v) for k, v in enumerate(outputs)))


def names(ops):
    return [f"{op.name.rpartition('.')[2][:6]} {op.results[0]}" for op in ops]


def test_a_reduction_starts_when_its_bucket_is_made():
    ops = [compute(0, 0, result=1), compute(1, 1, result=2), compute(2, 2, result=3),
           reduce(1, 4), reduce(2, 5), reduce(3, 6)]  # fmt: skip
    made = program(ops, 7, 1, (4, 5, 6))
    two = overlapped(made, limit=2 * 4 * ELEMENT)
    assert [op.results[0] for op in two.ops] == [1, 2, 4, 5, 3, 6]
    assert [(p.kind, len(p.ops)) for p in pieces(two, 2 * 4 * ELEMENT)] == [
        ("run", 2), ("start", 2), ("run", 1), ("start", 1), ("wait", 2), ("wait", 1),
    ]  # fmt: skip


def test_at_most_two_reductions_that_nobody_reads_lie_under_way():
    """Their operands live until they are awaited; one that is read is awaited by its reader."""
    ops = [compute(k, k, result=k + 1) for k in range(5)]
    ops += [reduce(k + 1, k + 6) for k in range(4)] + [reduce(5, 10), compute(10, 10, result=11)]
    made = overlapped(program(ops, 12, 1, (6, 7, 8, 9, 11)), limit=1)
    found = [(p.kind, p.ops[0].results[0]) for p in pieces(made, 1) if p.kind != "run"]
    assert found == [
        ("start", 6), ("start", 7), ("start", 8), ("wait", 6), ("start", 9), ("wait", 7),
        ("start", 10), ("wait", 10), ("wait", 8), ("wait", 9),
    ]  # fmt: skip


def test_a_sum_of_what_is_made_of_nothing_stays_with_its_maker():
    ops = [compute(0, 0, result=1), compute(result=2), reduce(2, 3), compute(1, 3, result=4)]
    assert [op.results[0] for op in overlapped(program(ops, 5, 1, (4,))).ops] == [1, 2, 3, 4]


def test_a_bucket_does_not_wait_for_what_comes_after_a_reader():
    ops = [compute(0, 0, result=1), reduce(1, 2), compute(2, 2, result=3), reduce(3, 4)]
    made = program(ops, 5, 1, (4,))
    assert overlapped(made).ops == made.ops
    assert [p.kind for p in pieces(made)] == ["run", "start", "wait", "run", "start", "wait"]


def layers():
    """Four layers of stored weights 1..4, gathered one by one, and cast first."""
    ops, x = [], 0
    for k in range(4):
        cast, whole, y = 5 + 3 * k, 6 + 3 * k, 7 + 3 * k
        narrow = Op("aten._to_copy.default", (Ref(1 + k),), (), (cast,))
        ops += [narrow, gather(cast, whole), compute(x, whole, result=y)]
        x = y
    return program(ops, 17, 5, (x,))


def test_gathers_run_one_bucket_ahead_of_need():
    found = overlapped(layers(), limit=1)
    assert [op.results[0] for op in found.ops] == [5, 6, 8, 9, 7, 11, 12, 10, 14, 15, 13, 16]


def test_a_cap_on_gathered_bytes_holds_gathers_back():
    assert overlapped(layers(), limit=1, ahead=2 * 4 * ELEMENT - 1).ops == layers().ops


def test_forward_and_backward_share_no_bucket():
    ops = [gather(0, 1), gather(0, 2, "backward")]
    assert [len(b) for b in buckets(program(ops, 3, 1), ops)] == [1, 1]


@given(
    st.lists(
        st.tuples(
            st.sampled_from([("comm.all_reduce", "sum"), ("comm.all_reduce", "max")]),
            st.integers(0, 60),
        )
    ),
    st.integers(1, 100),
)
def test_buckets_hold_one_kind_within_their_limit_in_order(asked, limit):
    values = [Value("uint8", (size,)) for _, size in asked]
    ops = [
        Op(name, (Ref(k), "data", how), (), (len(values) + k,))
        for k, ((name, how), _) in enumerate(asked)
    ]
    made = Program(tuple(values + values), (), tuple(ops), ())
    found = buckets(made, ops, limit)
    assert sorted(op.results[0] for b in found for op in b) == [op.results[0] for op in ops]
    for bucket in found:
        assert len({kind_of(op, made) for op in bucket}) == 1
        assert len(bucket) == 1 or sum(load_of(op, made) for op in bucket) <= limit
        assert list(bucket) == sorted(bucket, key=lambda op: op.results[0])
    for kind in {kind_of(op, made) for op in ops}:
        mine = [b for b in found if kind_of(b[0], made) == kind]
        for bucket, after in itertools.pairwise(mine):  # no room for the next one
            assert sum(load_of(op, made) for op in (*bucket, after[0])) > limit


@given(case=annotated(), limit=st.sampled_from([1, 100, 2**25]))
def test_the_new_order_can_run_and_loses_nothing(case, limit):
    graph, _, _, axes, pinned, stored, outputs = case
    completed = propagate(graph, axes, pinned, stored)
    here = everywhere(axes)[0]
    local = partition(graph, completed, axes, here, outputs).program
    found = overlapped(local, limit)
    assert sorted(map(id, found.ops)) == sorted(map(id, local.ops))
    known = {value for _, value in found.inputs}
    for op in found.ops:
        assert known.issuperset(op.inputs)
        known.update(op.results)
    others = [op for op in local.ops if op.name not in COLLECTIVES]
    order = {id(op): place for place, op in enumerate(found.ops)}
    made = [order[id(op)] for op in others if len(op.inputs) != 1]  # no cast before a gather
    assert made == sorted(made), "what is computed keeps its order"


def test_what_the_batch_alone_decides_is_summed_first():
    """The count of a loss's tokens; not a sum of what weights have touched."""
    values = tuple(Value("float64", (4,)) for _ in range(7))
    ops = (
        compute(0, 1, result=2),
        compute(1, 1, result=3),
        reduce(3, 4),
        reduce(2, 5),
        compute(4, 5, result=6),
    )
    made = Program(values, (("model/w", 0), ("batch/x", 1)), ops, (("y", 6),))
    found = overlapped(made)
    assert [op.results[0] for op in found.ops] == [3, 4, 2, 5, 6]
    cut = [(piece.kind, len(piece.ops)) for piece in pieces(found)]
    assert cut[:3] == [("run", 1), ("start", 1), ("run", 1)]


def stack(layers_, ops_each=8):
    """Layers `blocks.k` of equal ops, and a head."""
    ops, x = [], 0
    for k in range(layers_):
        for _ in range(ops_each):
            ops.append(compute(x, x, result=x + 1, module=f"blocks.{k}.mlp"))
            x += 1
    ops.append(compute(x, x, result=x + 1, module="head"))
    return program(ops, x + 2, 1, (x + 1,))


def test_equal_layers_are_cut_out():
    assert repeated(stack(3)) == {0, 8, 16, 24}
    assert [len(piece.ops) for piece in pieces(stack(3))] == [8, 8, 8, 1]


def test_what_does_not_repeat_or_is_small_is_not_cut():
    assert repeated(stack(1)) == frozenset()
    assert repeated(stack(3, ops_each=7)) == frozenset()


def test_layouts_of_weights_are_gathered_in_buckets():
    """Through the partitioner: three sharded weights, one start."""
    values = tuple(Value("float64", (4, 4)) for _ in range(7))
    ops = tuple(compute(0 if k == 0 else 3 + k, 1 + k, result=4 + k) for k in range(3))
    made = Program(values, tuple((f"x{k}", k) for k in range(4)), ops, (("y", 6),))
    axes = axes_of(2)
    rows = Layout.of(axes, {"data": Shard(0)})
    completed = propagate(made, axes, {0: rows}, dict.fromkeys((1, 2, 3), rows))
    local = partition(made, completed, axes, {"data": 0}, {"y": rows}).program
    kinds = [(p.kind, len(p.ops)) for p in pieces(overlapped(local))]
    assert kinds == [("start", 3), ("wait", 3), ("run", 3)]
