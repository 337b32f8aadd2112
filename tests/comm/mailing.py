"""What ranks do with messages in tests of processes (`tests/comm/crew.py`) and threads."""

from __future__ import annotations

import random
import time

import torch

from meshwright.comm.base import Group, Start, Wait, all_reduce, barrier, recv, send
from tests.comm.letters import MIXED, exchange, random_pattern
from tests.comm.traffic import numbers, same

F32 = (torch.float32,)


def everyone(comm):
    return Group.world(comm.world.size)


def said(body):
    """What it answers, or how it fails, and when."""
    try:
        return "answer", str(body()), time.time()
    except Exception as error:  # noqa: BLE001  the test looks at it
        return type(error).__name__, str(error), time.time()


def pattern_after_pattern(comm, seed, patterns, count):
    """Legal patterns of messages, one after the other, with no meeting between them."""
    for k in range(patterns):
        comm.perform(exchange(comm.world.rank, random_pattern(comm.world.size, seed + k, count)))


def mixed_with_collectives(comm, seed, count):
    """Messages under way while collectives over the same ranks, and over all, come and go."""
    me, dice = comm.world.rank, random.Random(seed)

    def body():
        for k in range(count):
            messages = exchange(me, random_pattern(comm.world.size, seed + k, 6))
            total = yield Start("all_reduce", everyone(comm), (torch.ones(3) * k,), label="t")
            if dice.random() < 0.5:
                yield from messages
            (answer,) = yield Wait(total)
            assert answer[0] == k * comm.world.size
            yield from messages

    comm.perform(body())


def sizes(comm, lengths, rounds):
    """Messages of these many floats both ways at once; bigger ones come after smaller ones."""
    me, other = comm.world.rank, 1 - comm.world.rank

    def body():
        for k, length in enumerate(lengths * rounds):
            pair, back = Group("pipeline", (me, other)), Group("pipeline", (other, me))
            mine = torch.full((length,), float(10 * k + me))
            sent = yield Start("send", pair, (mine,), label="x")
            got = yield Start("recv", back, shapes=((length,),), dtypes=F32, label="x")
            (came,) = yield Wait(got)
            yield Wait(sent)
            mine.fill_(-1)
            assert torch.equal(came, torch.full((length,), float(10 * k + other)))

    comm.perform(body())


def ahead(comm, count, length):
    """Rank 0 sends all before rank 1 takes any: as much as a driver keeps, without a wait."""
    if comm.world.rank == 0:
        for k in range(count):
            comm.perform(send((torch.full((length,), float(k)),), 0, 1, f"x {k}"))
    comm.perform(barrier(everyone(comm), "all sent"))
    if comm.world.rank == 1:
        for k in range(count):
            (x,) = comm.perform(recv(((length,),), F32, 0, 1, f"x {k}"))
            assert torch.equal(x, torch.full((length,), float(k)))


def blocked(comm, count, length):
    """More than a driver keeps: waits last until the receiver comes, and nothing is lost."""
    if comm.world.rank == 0:

        def sender():
            pair, handles = Group("pipeline", (0, 1)), []
            for k in range(count):
                x = torch.full((length,), float(k))
                handles.append((yield Start("send", pair, (x,), label="x")))
            yield Start("send", Group("pipeline", (0, 1)), (torch.ones(1),), label="end")
            for handle in handles:
                yield Wait(handle)

        comm.perform(sender())
        return
    for k in range(count):
        (x,) = comm.perform(recv(((length,),), F32, 0, 1, "x"))
        assert torch.equal(x, torch.full((length,), float(k)))
    comm.perform(recv(((1,),), F32, 0, 1, "end"))


def kinds(comm):
    """Many dtypes and empty tensors in one message, and tensors that are not dense."""
    odd = (numbers((4, 6), torch.float64, 3).t(), numbers((8,), torch.bool, 4)[::2])
    given = (*MIXED, *odd)
    if comm.world.rank == 0:
        comm.perform(send(given, 0, 1))
    elif comm.world.rank == 1:
        shapes, dtypes = tuple(tuple(t.shape) for t in given), tuple(t.dtype for t in given)
        got = comm.perform(recv(shapes, dtypes, 0, 1))
        assert same(got, tuple(t.contiguous() for t in given))


def opposed(comm):
    """Rank 1 first receives from 2, which first meets 0, which first sends to 1: no lane is met."""
    me = comm.world.rank
    if me == 0:
        comm.perform(send((torch.ones(2),), 0, 1, "a"))
        comm.perform(all_reduce(torch.ones(1), Group("data", (0, 2)), label="late group"))
        comm.perform(recv(((2,),), F32, 1, 0, "back"))
    elif me == 1:
        comm.perform(recv(((2,),), F32, 2, 1, "b"))
        comm.perform(recv(((2,),), F32, 0, 1, "a"))
        comm.perform(send((torch.ones(2),), 1, 0, "back"))
    else:
        comm.perform(all_reduce(torch.ones(1), Group("data", (0, 2)), label="late group"))
        comm.perform(send((torch.ones(2),), 2, 1, "b"))


def disagree(comm, shape, dtype, label):
    """Both ends say what they mean; then the sender waits for something that cannot come."""
    comm.perform(barrier(everyone(comm)))

    def body():
        if comm.world.rank == 0:
            comm.perform(send((torch.ones(2),), 0, 1, "x 1"))
            return comm.perform(recv(((1,),), F32, 1, 0, "never"))
        return comm.perform(recv((shape,), (dtype,), 0, 1, label))

    return said(body)


def awaited(comm, who, what):
    """All but `who`, which ends at once or never comes, wait for a message from or to it."""
    comm.perform(barrier(everyone(comm)))
    me = comm.world.rank
    if me == who:
        while what == "killed":
            time.sleep(1)
        return "stayed", "away", 0.0
    if what == "full":
        big = torch.ones(1 << 25)
        return said(lambda: comm.perform(send((big,), me, who, "x 7")))
    return said(lambda: comm.perform(recv(((2,),), F32, who, me, "x 7")))


def unreceived(comm, late):
    """Rank 0 sends and leaves; rank 1 takes it later, or never."""
    if comm.world.rank == 0:
        for k in range(3):
            comm.perform(send((torch.full((1000,), float(k)),), 0, 1, "x"))
        return None
    if late:
        time.sleep(0.2)  # rank 0 is leaving by now, or else the test is easier than meant
        return [comm.perform(recv(((1000,),), F32, 0, 1, "x"))[0][0].item() for _ in range(3)]
    return None


def told(comm):
    """What the ledger has after one message."""
    if comm.world.rank == 0:
        comm.perform(send((torch.ones(3), torch.ones(1).bool()), 0, 1, "x 3"))
    else:
        comm.perform(recv(((3,), (1,)), (torch.float32, torch.bool), 0, 1, "x 3"))
    return comm.ledger.last_left.text(), comm.ledger.last_left.bytes


BODIES = {
    body.__name__: body
    for body in (
        ahead, awaited, blocked, disagree, kinds, mixed_with_collectives, opposed,
        pattern_after_pattern, sizes, told, unreceived,
    )
}  # fmt: skip
