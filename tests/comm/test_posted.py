"""Messages between ranks of one thread: order, refusals, and what unbuffered sends show."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meshwright.comm.base import Group, Start, Wait, all_reduce, recv, send
from meshwright.comm.local import run_local
from meshwright.errors import InternalError, Stalled
from tests.comm.letters import MIXED, exchange, patterns

F32 = (torch.float32,)
EAGER = ["buffered", "rendezvous", "strict"]


def ones(value: float = 1.0) -> tuple[torch.Tensor, ...]:
    return (torch.full((2,), float(value)),)


@given(patterns())
def test_any_legal_pattern_is_delivered_in_order(pattern):
    run_local([exchange(rank, pattern) for rank in range(pattern.size)])


@given(patterns(early=True), st.sampled_from(EAGER))
def test_receives_posted_in_time_need_no_buffers(pattern, sends):
    run_local([exchange(rank, pattern) for rank in range(pattern.size)], sends)


def test_tensors_of_one_message_may_differ_in_dtype_and_be_empty():
    def receiver():
        return (yield from recv(tuple(t.shape for t in MIXED), tuple(t.dtype for t in MIXED), 0, 1))

    _, got = run_local([send(MIXED, 0, 1), receiver()])
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, MIXED, strict=True))
    assert not {t.data_ptr() for t in got if t.numel()} & {t.data_ptr() for t in MIXED}


def test_messages_and_collectives_over_the_same_ranks_go_their_own_ways():
    group = Group("pipeline", (0, 1))

    def rank(k):
        total = all_reduce(torch.tensor([k + 1.0]), group)
        if k == 0:
            yield from send(ones(7), 0, 1)
            return (yield from total)
        first = yield from total
        (x,) = yield from recv(((2,),), F32, 0, 1)
        return first + x[0]

    assert [t.item() for t in run_local([rank(0), rank(1)])] == [3.0, 10.0]


def test_both_directions_cross_where_sends_are_buffered_or_receives_posted_first():
    def sends_first(k):
        yield from send(ones(k), k, 1 - k)
        return (yield from recv(((2,),), F32, 1 - k, k))

    def posts_first(k):
        pair = Group("pipeline", (1 - k, k))
        handle = yield Start("recv", pair, shapes=((2,),), dtypes=F32)
        yield from send(ones(k), k, 1 - k)
        return (yield Wait(handle))

    assert [t[0][0].item() for t in run_local([sends_first(0), sends_first(1)])] == [1, 0]
    for sends in EAGER:
        found = run_local([posts_first(0), posts_first(1)], sends)
        assert [t[0][0].item() for t in found] == [1, 0]
    for sends in EAGER[1:]:
        with pytest.raises(Stalled, match=r"rank 0 waits in send to rank 1 for its recv, number 0"):
            run_local([sends_first(0), sends_first(1)], sends)


def test_a_strict_send_waits_where_it_is_started():
    """A wait for a later send lets the first go on, where its start does not wait already."""

    def sender():
        first = yield Start("send", Group("pipeline", (0, 1)), ones(), label="a")
        second = yield Start("send", Group("pipeline", (0, 2)), ones(), label="b")
        yield Wait(second)
        yield Wait(first)

    def last():
        yield from recv(((2,),), F32, 0, 2, "b")
        yield from send(ones(), 2, 1, "go")

    def middle():
        yield from recv(((2,),), F32, 2, 1, "go")
        yield from recv(((2,),), F32, 0, 1, "a")

    run_local([sender(), middle(), last()], "rendezvous")
    with pytest.raises(Stalled) as caught:
        run_local([sender(), middle(), last()], "strict")
    assert str(caught.value).splitlines() == [
        "no rank can move:",
        "  rank 0 waits in send of a to rank 1 for its recv, number 0 that way",
        "  rank 1 waits in recv of go from rank 2 for its send, number 0 that way",
        "  rank 2 waits in recv of b from rank 0 for its send, number 0 that way",
    ]


@pytest.mark.parametrize(
    ("shapes", "dtypes", "label"),
    [(((3,),), F32, "x"), (((2,),), (torch.float64,), "x"), (((2,),), F32, "y")],
)
def test_sides_that_mean_different_messages_are_told_apart(shapes, dtypes, label):
    with pytest.raises(InternalError) as caught:
        run_local([send(ones(), 0, 1, "x"), recv(shapes, dtypes, 0, 1, label)])
    said = str(caught.value)
    assert "ranks 0 and 1 disagree about the next message from rank 0 to rank 1" in said
    assert "it sends message float32[2] (x); the other expects message " in said


@pytest.mark.parametrize(
    ("start", "said"),
    [
        (Start("send", Group("p", (1, 0)), ones()), "for rank 1 to start"),
        (Start("recv", Group("p", (0, 1)), shapes=((1,),), dtypes=F32), "for rank 1 to start"),
        (Start("send", Group("p", (0, 0)), ones()), "from one rank to another"),
        (Start("send", Group("p", (0, 1, 2)), ones()), "from one rank to another"),
        (Start("send", Group("p", (0, 1))), "carries no tensor"),
        (Start("recv", Group("p", (1, 0)), shapes=((1,),)), "1 shapes and 0 dtypes"),
        (Start("recv", Group("p", (1, 0))), "takes shapes"),
    ],
)
def test_what_is_no_message_is_refused(start, said):
    def rank():
        yield start

    def idle():
        return
        yield

    with pytest.raises(InternalError, match=said):
        run_local([rank(), idle(), idle()])
