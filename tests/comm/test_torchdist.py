"""The gloo driver against `comm/local.py`, and what it says when ranks do not play along."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meshwright.comm import gloo
from meshwright.comm.base import (
    Group,
    Start,
    Wait,
    World,
    all_gather,
    all_reduce,
    barrier,
    gather_json,
)
from meshwright.comm.local import collective, run_local
from meshwright.comm.meeting import Deadline
from meshwright.comm.torchdist import TorchDist
from meshwright.errors import InternalError, PeerLost, Stalled, UsageError, UserCodeError
from tests.comm.traffic import many_buckets, same

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


def numbers(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 50, shape, generator=generator)
    if dtype == torch.bool:
        return values % 2 == 0
    return (values / 7).to(dtype) if dtype.is_floating_point else values.to(dtype)


def cases(n):
    """(what, the Start of each member) for every op, dtype and unevenness that is promised."""
    group = Group("data", tuple(range(n)))
    ranks = range(n)
    for dtype in DTYPES:
        yield (
            f"all_reduce {dtype}",
            [Start("all_reduce", group, (numbers((3, 5), dtype, k),)) for k in ranks],
        )
        yield (
            f"reduce_scatter {dtype}",
            [
                Start(
                    "reduce_scatter",
                    group,
                    tuple(numbers((j + 1, 2), dtype, 9 * k + j) for j in ranks),
                )
                for k in ranks
            ],
        )
        uneven = tuple((k, 3) for k in ranks)
        yield (
            f"all_gather {dtype}",
            [
                Start("all_gather", group, (numbers(uneven[k], dtype, k),), shapes=uneven)
                for k in ranks
            ],
        )
        yield (
            f"all_to_all {dtype}",
            [
                Start(
                    "all_to_all",
                    group,
                    tuple(numbers((k, j + 1), dtype, 9 * k + j) for j in ranks),
                    shapes=tuple((j, k + 1) for j in ranks),
                )
                for k in ranks
            ],
        )
        yield (
            f"broadcast {dtype}",
            [Start("broadcast", group, (numbers((4,), dtype, k),), root=1) for k in ranks],
        )
        yield (
            f"permute {dtype}",
            [Start("permute", group, (numbers((2, 2), dtype, k),), root=1) for k in ranks],
        )
    for reduce in ("max", "min"):
        yield (
            reduce,
            [Start("all_reduce", group, (numbers((9,), torch.float32, k),), reduce) for k in ranks],
        )
    yield "empty", [Start("all_reduce", group, (torch.zeros(0, 4),)) for _ in ranks]
    yield "scalar", [Start("all_reduce", group, (torch.tensor(k + 0.5),)) for k in ranks]
    yield (
        "columns",
        [Start("all_gather", group, (numbers((4, 6), torch.float64, k).t(),)) for k in ranks],
    )
    yield "barrier", [Start("barrier", group) for _ in ranks]


def one(request):
    handle = yield Start(
        request.op,
        request.group,
        request.tensors,
        request.reduce,
        request.shapes,
        request.root,
        request.label,
    )
    return (yield Wait(handle))


def started(starts):
    handles = [None] * len(starts)
    for k, start in enumerate(starts):
        handles[k] = yield start
    return handles


def test_every_collective_answers_what_the_local_driver_answers_to_the_last_bit(threads):
    table = list(cases(3))
    expected = [collective(starts) for _, starts in table]

    def body(comm):
        return [comm.perform(one(starts[comm.world.rank])) for _, starts in table]

    for rank, answers in enumerate(threads(3, body)):
        for (what, _), answer, wanted in zip(table, answers, expected, strict=True):
            assert len(answer) == len(wanted[rank]), what
            for got, want in zip(answer, wanted[rank], strict=True):
                assert got.dtype == want.dtype, what
                assert got.shape == want.shape, what
                assert torch.equal(got, want), (what, got, want)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_buckets_answer_what_the_local_driver_answers(threads, n):
    table = many_buckets(n)
    expected = [collective(starts) for starts in table]

    def body(comm):
        return [comm.perform(one(starts[comm.world.rank])) for starts in table]

    for rank, answers in enumerate(threads(n, body)):
        for starts, answer, wanted in zip(table, answers, expected, strict=True):
            ring = (
                starts[0].op == "all_reduce"
                and n * sum(t.nbytes for t in starts[0].tensors) > gloo._GATHER_LIMIT
            )
            assert len(answer) == len(wanted[rank])
            for got, want in zip(answer, wanted[rank], strict=True):
                assert (got.shape, got.dtype) == (want.shape, want.dtype)
                # gloo's ring adds large sums in an order of its own
                assert (
                    torch.allclose(got, want, rtol=1e-5, atol=1e-5)
                    if ring
                    else same((got,), (want,))
                )


def test_large_sums_agree_on_all_ranks_and_leave_the_operand_alone(threads):
    size = gloo._GATHER_LIMIT

    def body(comm):
        mine = torch.full((size,), float(comm.world.rank + 1))
        total = comm.perform(all_reduce(mine, Group.world(3)))
        return torch.equal(mine, torch.full((size,), comm.world.rank + 1.0)), total

    results = threads(3, body)
    assert all(kept for kept, _ in results)
    assert all(torch.equal(total, torch.full((size,), 6.0)) for _, total in results)


@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=4, max_size=4),
)
def test_a_world_of_one_answers_itself(rows, shapes):
    comm = TorchDist()
    group = Group("data", (0,))
    x = torch.arange(float(rows * 2)).view(rows, 2)
    for request in (
        Start("all_reduce", group, (x,)),
        Start("reduce_scatter", group, (x,)),
        Start("all_gather", group, (x,), shapes=((rows, 2),)),
        Start("all_to_all", group, (x,), shapes=((rows, 2),)),
        Start("broadcast", group, (x,)),
        Start("permute", group, (x,), root=1),
    ):
        (answer,) = comm.perform(one(request))
        assert torch.equal(answer, x)
    assert comm.ledger.entered == comm.ledger.left == 6
    parts = [torch.ones(shape) for shape in shapes]
    assert len(comm.perform(all_gather(parts[0], group, (shapes[0],)))) == 1


def test_several_collectives_may_be_under_way_at_once(threads):
    def body(comm):
        group = Group.world(2)

        def exchange():
            starts = [Start("all_reduce", group, (torch.full((9,), k + 0.0),)) for k in range(8)]
            handles = yield from started(starts)
            totals = []
            for handle in reversed(handles):
                (total,) = yield Wait(handle)
                totals.append(total[0].item())
            return totals

        return comm.perform(exchange())

    assert threads(2, body) == [[2.0 * k for k in reversed(range(8))]] * 2


def test_groups_connect_their_members_only(threads):
    def body(comm):
        pair = Group("data", (0, 2) if comm.world.rank in {0, 2} else (1, 3))
        total = comm.perform(all_reduce(torch.tensor([comm.world.rank]), pair))
        return total.item()

    assert threads(4, body) == [2, 4, 2, 4]


def test_json_of_different_lengths_is_gathered_in_order(threads):
    def body(comm):
        return comm.perform(gather_json({"rank": comm.world.rank * 1000}, Group.world(3)))

    assert threads(3, body) == [[{"rank": 0}, {"rank": 1000}, {"rank": 2000}]] * 3


def test_advance_stops_at_what_is_no_request_and_goes_on_from_there():
    group = Group.world(1)

    def forever():
        batch = None
        while True:
            handle = yield Start("all_reduce", group, (torch.tensor([batch or 0]),))
            (total,) = yield Wait(handle)
            batch = yield ("step", total.item())

    comm, exchange = TorchDist(), forever()
    assert comm.advance(exchange) == ("step", 0)
    assert comm.advance(exchange, 7) == ("step", 7)
    assert comm.advance(exchange, 9) == ("step", 9)


def test_perform_refuses_what_is_no_request():
    def odd():
        yield "not a request"

    with pytest.raises(InternalError, match="no request"):
        TorchDist().perform(odd())


def test_an_error_is_thrown_in_where_the_request_was_yielded():
    def careful():
        try:
            yield Start("all_reduce", Group("data", (4, 5)), (torch.zeros(1),))
        except InternalError as error:
            return str(error)

    said = TorchDist().perform(careful())
    assert "rank 0 starts all_reduce over data" in said
    assert "[4, 5]" in said


def test_a_rank_that_does_not_come_is_named_and_so_is_where_it_is(threads):
    group = Group.world(3)
    stalled = threading.Event()

    def body(comm):
        comm.perform(barrier(group, "start"))
        if comm.world.rank == 2:
            assert stalled.wait(30)
        try:
            comm.perform(all_reduce(torch.ones(2), group, label="gradient of w"))
        finally:
            stalled.set()

    first, second, third = threads(3, body, deadline=Deadline(1.0, 1.0))
    told = [error for error in (first, second) if isinstance(error, Stalled)]
    assert told, (first, second)
    assert "all_reduce over world (gradient of w), call 2" in str(told[0])
    assert "more than 1 s" in str(told[0])
    assert "rank 2 did not come" in str(told[0])
    assert "--timeout" in str(told[0])
    assert isinstance(third, PeerLost), third
    assert "rank 2 did not come" in str(third)


def test_a_group_whose_member_never_comes_names_it(threads):
    def body(comm):
        if comm.world.rank == 0:
            comm.perform(all_reduce(torch.ones(2), Group("data", (0, 1)), label="w"))

    first, _ = threads(2, body, deadline=Deadline(0.6, 0.6))
    assert isinstance(first, Stalled | PeerLost)
    assert "rank 1" in str(first)


def test_a_rank_that_fails_is_known_to_the_others_with_its_reason(threads):
    def body(comm):
        comm.perform(barrier(Group.world(2)))
        if comm.world.rank == 1:
            comm.abandon("ValueError: bad label 12")
            return None
        return comm.perform(all_reduce(torch.ones(2), Group.world(2), label="w"))

    lost, _ = threads(2, body)
    assert isinstance(lost, PeerLost)
    assert "all_reduce over world (w)" in str(lost)
    assert "rank 1 ended: ValueError: bad label 12" in str(lost)


def test_ranks_that_mean_different_collectives_are_told_apart_instead_of_added_up(threads):
    def body(comm):
        shape = (4,) if comm.world.rank == 2 else (2, 2)
        return comm.perform(all_reduce(torch.ones(shape), Group.world(3), label="w"))

    said = {str(error) for error in threads(3, body)}
    (only,) = said
    assert only.startswith(
        "ranks disagree about the next collective over world: "
        "ranks 0, 1: all_reduce sum float32[2, 2] (w); rank 2: all_reduce sum float32[4] (w). All "
    )


def test_another_order_is_noticed_too(threads):
    def body(comm):
        first, second = ("a", "b") if comm.world.rank == 0 else ("b", "a")
        comm.perform(all_reduce(torch.ones(3), Group.world(2), label=first))
        return comm.perform(all_reduce(torch.ones(3), Group.world(2), label=second))

    for error in threads(2, body):
        assert isinstance(error, UserCodeError)
        assert (
            "rank 0: all_reduce sum float32[3] (a); rank 1: all_reduce sum float32[3] (b)"
            in str(error)
        )


def test_another_token_is_refused_by_both_sides(threads):
    owner, stranger = threads(2, lambda comm: "joined", tokens=("one", "two"), seconds=5)
    assert isinstance(owner, UsageError)
    assert "rank 1 holds another job token" in str(owner)
    assert isinstance(stranger, UsageError), stranger
    assert "rank 1 and rank 0 hold different job tokens" in str(stranger)
    assert "one" not in (str(owner) + str(stranger)).replace("one launch", "")


def test_no_token_at_all_is_an_engine_that_gives_none(threads):
    assert threads(2, lambda comm: "joined", tokens=(None, None)) == ["joined"] * 2


def test_ranks_that_never_start_are_named(threads):
    (alone,) = threads(3, lambda comm: None, tokens=(None,) * 3, seconds=0.5, ranks=(0,))
    assert isinstance(alone, Stalled)
    assert "ranks 1, 2" in str(alone)


def test_after_closing_a_collective_is_a_bug_that_says_so(threads):
    def body(comm):
        comm.close()
        return comm.perform(all_reduce(torch.ones(1), Group.world(2)))

    assert all("has left" in str(error) for error in threads(2, body))


def test_the_local_driver_and_this_one_run_the_same_exchange(threads):
    def exchange(rank):
        total = yield from all_reduce(torch.tensor([rank + 1.0]), Group.world(2))
        parts = yield from all_gather(total * rank, Group.world(2), ((1,), (1,)))
        return [part.item() for part in parts]

    ours = threads(2, lambda comm: comm.perform(exchange(comm.world.rank)))
    assert ours == run_local([exchange(0), exchange(1)])


def test_a_world_of_several_needs_a_place_to_meet():
    with pytest.raises(InternalError, match="place to meet"):
        TorchDist.connect(World(0, 2), None)
