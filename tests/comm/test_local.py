"""N ranks in one thread: collectives against numpy, refusals, and the deadlock report."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meshwright.comm.base import (
    Group,
    Start,
    Wait,
    all_gather,
    all_reduce,
    barrier,
    gather_json,
)
from meshwright.comm.local import LocalWorld, collective, run_local
from meshwright.errors import InternalError, Stalled
from tests.comm.traffic import BUCKETED, bucket, same

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8]
NUMPY = {"sum": np.sum, "max": np.max, "min": np.min}


def ask(op, group, tensors=(), **named):
    """Start a collective and wait for it."""
    handle = yield Start(op, group, tuple(tensors), **named)
    return (yield Wait(handle))


def blocks(size, *shape, dtype=torch.float64):
    """One tensor per rank, of small whole numbers."""
    random = torch.Generator().manual_seed(size)
    return [torch.randint(0, 9, shape, generator=random).to(dtype) for _ in range(size)]


sizes = st.integers(1, 5)


@given(size=sizes, dtype=st.sampled_from(DTYPES), how=st.sampled_from(list(NUMPY)))
def test_all_reduce(size, dtype, how):
    world, mine = Group.world(size), blocks(size, 3, 2, dtype=dtype)
    wanted = NUMPY[how](np.stack([t.float().numpy() for t in mine]), axis=0)
    kept = [t.clone() for t in mine]
    for (found,) in run_local([ask("all_reduce", world, (t,), reduce=how) for t in mine]):
        assert found.dtype == dtype
        assert np.array_equal(found.float().numpy(), wanted)
    assert all(torch.equal(a, b) for a, b in zip(mine, kept, strict=True)), "operands are kept"


@given(size=sizes, how=st.sampled_from(list(NUMPY)), data=st.data())
def test_reduce_scatter_with_uneven_chunks(size, how, data):
    rows = [data.draw(st.integers(0, 3)) for _ in range(size)]
    world = Group.world(size)
    mine = [blocks(size, sum(rows), 2)[k].split(rows) for k in range(size)]
    found = run_local([ask("reduce_scatter", world, parts, reduce=how) for parts in mine])
    for rank, (chunk,) in enumerate(found):
        wanted = NUMPY[how](np.stack([parts[rank].numpy() for parts in mine]), axis=0)
        assert np.array_equal(chunk.numpy(), wanted)


@given(size=sizes, data=st.data())
def test_all_gather_of_uneven_parts(size, data):
    rows = [data.draw(st.integers(0, 3)) for _ in range(size)]
    world = Group.world(size)
    mine = [torch.full((n, 2), float(k)) for k, n in enumerate(rows)]
    shapes = tuple((n, 2) for n in rows)
    for parts in run_local([ask("all_gather", world, (t,), shapes=shapes) for t in mine]):
        assert [tuple(part.shape) for part in parts] == list(shapes)
        assert torch.equal(torch.cat(parts), torch.cat(mine))


@given(size=sizes, data=st.data())
def test_all_to_all_transposes_the_parts(size, data):
    world = Group.world(size)
    rows = [[data.draw(st.integers(0, 2)) for _ in range(size)] for _ in range(size)]
    mine = [
        [torch.full((n,), 10.0 * k + j) for j, n in enumerate(row)] for k, row in enumerate(rows)
    ]
    found = run_local([ask("all_to_all", world, parts) for parts in mine])
    for rank, parts in enumerate(found):
        for sender, part in enumerate(parts):
            assert torch.equal(part, mine[sender][rank])


@given(size=sizes, root=st.integers(0, 4))
def test_broadcast_and_permute(size, root):
    world, mine = Group.world(size), blocks(size, 2)
    root %= size
    for (found,) in run_local([ask("broadcast", world, (t,), root=root) for t in mine]):
        assert torch.equal(found, mine[root])
    found = run_local([ask("permute", world, (t,), root=root) for t in mine])
    for rank, (part,) in enumerate(found):
        assert torch.equal(part, mine[(rank - root) % size])


def test_answers_are_the_receivers_own():
    """Writing into what was received changes no other rank's tensors."""
    world, mine = Group.world(2), blocks(2, 3)
    kept = [t.clone() for t in mine]
    requests = [("all_gather", {"shapes": ((3,), (3,))}), ("broadcast", {}), ("permute", {})]
    for op, named in [*requests, ("all_reduce", {})]:
        first, second = run_local([ask(op, world, (t,), **named) for t in mine])
        before = [t.clone() for t in second]
        for tensor in first:
            tensor.fill_(-1)
        assert all(torch.equal(a, b) for a, b in zip(second, before, strict=True)), op
        assert all(torch.equal(a, b) for a, b in zip(mine, kept, strict=True)), op


@pytest.mark.parametrize("n", [2, 3])
def test_a_bucket_is_its_tensors_one_by_one(n):
    for op in BUCKETED:
        table = bucket(Group.world(n), 5, op, [4, 0, 9])
        for member, answers in enumerate(collective(table)):
            for j in range(3):
                alone = collective([_only(start, j, 3) for start in table])[member]
                assert same(answers[j::3], alone), (op, j)


def _only(start, j, k):
    """The collective on the j-th tensors of a bucket alone."""
    return Start(
        start.op, start.group, start.tensors[j::k], start.reduce, start.shapes[j::k], start.root
    )


def test_reductions_run_in_group_order():
    """Sums in floating point depend on the order; ours does not depend on who came first."""
    numbers = [torch.tensor([x]) for x in (1e16, 1.0, -1e16, 1.0)]
    ordered = ((numbers[0] + numbers[1]) + numbers[2]) + numbers[3]
    starts = [Start("all_reduce", Group.world(4), (t,)) for t in numbers]
    assert all(torch.equal(found, ordered) for (found,) in collective(starts))


def test_groups_along_two_axes_do_not_mix():
    rows = [Group("tensor", (0, 1)), Group("tensor", (2, 3))]
    columns = [Group("data", (0, 2)), Group("data", (1, 3))]

    def rank(k):
        one = yield from all_reduce(torch.tensor([1.0 * k]), rows[k // 2])
        two = yield from all_reduce(one, columns[k % 2])
        return two.item()

    assert run_local([rank(k) for k in range(4)]) == [6.0] * 4


def test_many_may_be_under_way_and_be_awaited_in_any_order():
    world = Group.world(3)

    def rank(k):
        handles = {}
        for n in range(4):
            handles[n] = yield Start("all_reduce", world, (torch.tensor([k + 10.0 * n]),))
        order = [2, 0, 3, 1] if k else [3, 2, 1, 0]
        found = {}
        for n in order:
            (found[n],) = yield Wait(handles[n])
        return [found[n].item() for n in range(4)]

    assert run_local([rank(k) for k in range(3)]) == [[3.0, 33.0, 63.0, 93.0]] * 3


def test_helpers_agree():
    world = Group.world(3)

    def rank(k):
        yield from barrier(world)
        parts = yield from all_gather(torch.arange(k), world, ((0,), (1,), (2,)))
        told = yield from gather_json({"rank": k, "text": "é" * k}, world)
        return [part.tolist() for part in parts], told

    for parts, told in run_local([rank(k) for k in range(3)]):
        assert parts == [[], [0], [0, 1]]
        assert told == [{"rank": k, "text": "é" * k} for k in range(3)]


def test_one_rank_asks_nobody():
    world = Group.world(1)

    def rank():
        yield from barrier(world)
        x = yield from all_reduce(torch.ones(2), world)
        (y,) = yield from all_gather(x, world, ((2,),))
        return y

    exchange = rank()
    with pytest.raises(StopIteration) as end:
        next(exchange)
    assert torch.equal(end.value.value, torch.ones(2))


def test_a_world_lives_on_between_turns():
    """`advance` returns what is no request, and the collectives under way survive it."""
    world = LocalWorld(2)
    group = Group.world(2)

    def rank(k):
        batch = yield "ready"
        handle = yield Start("all_reduce", group, (torch.tensor([batch * (k + 1.0)]),))
        batch = yield f"rank {k} started"
        (total,) = yield Wait(handle)
        yield total.item() + batch
        return "done"

    exchanges = [rank(k) for k in range(2)]
    assert world.advance(exchanges, [None, None]) == ["ready", "ready"]
    assert world.advance(exchanges, [1.0, 10.0]) == ["rank 0 started", "rank 1 started"]
    assert world.advance(exchanges, [0.5, 0.25]) == [21.5, 21.25]
    assert world.perform(exchanges) == ["done", "done"]


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("all_reduce", {}), ("barrier", {})),
        (("all_reduce", {}), ("all_reduce", {"reduce": "max"})),
        (("broadcast", {}), ("all_gather", {})),
    ],
)
def test_ranks_that_disagree_are_told_what_each_wanted(first, second):
    world = Group.world(2)
    asked = [
        ask(op, world, (torch.ones(1),), label=f"layer.{k}", **named)
        for k, (op, named) in enumerate([first, second])
    ]
    with pytest.raises(InternalError) as caught:
        run_local(asked)
    text = str(caught.value)
    assert "ranks disagree about the next collective on axis world" in text
    for word in (first[0], second[0], "layer.0", "layer.1"):
        assert word in text


@pytest.mark.parametrize(
    ("op", "tensors", "named"),
    [
        ("all_reduce", [[torch.ones(2)], [torch.ones(1)]], {}),
        ("all_reduce", [[torch.ones(2)], [torch.ones(2, dtype=torch.float64)]], {}),
        ("reduce_scatter", [[torch.ones(2), torch.ones(1)], [torch.ones(1), torch.ones(2)]], {}),
        ("all_gather", [[torch.ones(2)], [torch.ones(3)]], {"shapes": ((2,), (2,))}),
    ],
)
def test_tensors_that_do_not_fit_are_refused(op, tensors, named):
    """A sum would broadcast here, and hang or crash over a real transport."""
    world = Group.world(2)
    with pytest.raises(InternalError, match=rf"{op} over world \(w\): rank 1 brings .* expects"):
        run_local([ask(op, world, mine, label="w", **named) for mine in tensors])


def test_only_members_may_start():
    with pytest.raises(InternalError, match=r"rank 1 starts all_reduce on .*not a member"):
        run_local([ask("barrier", Group("data", (0,))), ask("all_reduce", Group("data", (0,)))])


def test_a_deadlock_names_the_rank_the_op_and_who_is_missing():
    world = Group.world(3)

    def leaves():
        return 0
        yield

    exchanges = [
        ask("all_reduce", world, (torch.ones(1),), label="model/w (gpt.py:41)"),
        ask("barrier", Group("data", (1, 2))),
        leaves(),
    ]
    with pytest.raises(Stalled) as caught:
        run_local(exchanges)
    assert str(caught.value).splitlines() == [
        "no rank can move:",
        "  rank 0 waits in all_reduce over world (model/w (gpt.py:41)) for ranks [1, 2]",
        "  rank 1 waits in barrier over data (unlabelled) for ranks [2]",
        "  rank 2 has ended its turn",
    ]


def test_crossed_waits_are_a_deadlock():
    pairs = {0: (0, 1), 1: (1, 2), 2: (2, 0)}

    def rank(k):
        mine = Group("ring", tuple(sorted(pairs[k])))
        before = Group("ring", tuple(sorted(pairs[(k - 1) % 3])))
        yield from ask("barrier", mine)
        yield from ask("barrier", before)

    with pytest.raises(Stalled) as caught:
        run_local([rank(k) for k in range(3)])
    assert len(re.findall(r"waits in barrier", str(caught.value))) == 3


def test_an_error_of_one_rank_comes_out():
    def broken():
        raise ValueError("mine")
        yield

    with pytest.raises(ValueError, match="mine"):
        run_local([ask("barrier", Group.world(2)), broken()])


def test_what_is_no_request_is_refused():
    def odd():
        yield "coffee"

    with pytest.raises(InternalError, match="rank 0 yielded 'coffee', which is no request"):
        run_local([odd()])
