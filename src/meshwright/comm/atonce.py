"""Small collectives: one round that holds everything, in few words, since most are small."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence

from meshwright.comm.cargo import Cargo, move, views
from meshwright.comm.channel import SLOTS, Channel, Need
from meshwright.comm.pump import LINE, Call, Steps, compare, fold

__all__ = ["barrier", "gather", "part", "place", "reduce", "scatter"]


def reduce(call: Call) -> Steps:
    """Every member reduces all inputs, none of which is larger than a slot."""
    channel, tensors, how = call.channel, call.tensors, call.request.reduce
    cargo = Cargo(tensors)

    def fill(number: int) -> None:
        cargo.load(channel.address(channel.input(channel.me, number)), 0, cargo.size)

    number = yield from _meet(call, fill)
    mine = tensors[0] if len(tensors) == 1 else cargo.part(0, cargo.size)
    total = fold(channel.operands(number, mine), how)
    channel.inputs.release()
    return (total,) if mine is tensors[0] else views(total, [tensor.shape for tensor in tensors])


def scatter(call: Call) -> Steps:
    """A reduce-scatter of one tensor a member, none of which is larger than its part of a slot."""
    channel, tensors, me = call.channel, call.tensors, call.channel.me
    share, mine = part(channel), call.tensors[channel.me]

    def fill(number: int) -> None:
        slot = channel.address(channel.input(me, number))
        for member in channel.others:
            tensor = tensors[member]
            move(slot + place(me, member) * share, tensor.data_ptr(), tensor.nbytes)

    number = yield from _meet(call, fill)
    parts = [mine] * channel.size
    for member in channel.others:
        slot = channel.input(member, number) + place(member, me) * share
        parts[member] = channel.view(slot, mine.nbytes, mine.dtype, mine.shape)
    total = fold(parts, call.request.reduce)
    channel.inputs.release()
    return (total,)


def gather(call: Call, shapes: Sequence[tuple[int, ...]], counts: Sequence[int]) -> Steps:
    """An all-gather of one tensor a member, none of which is larger than a slot.

    Args:
        call: the collective.
        shapes: of the members' tensors.
        counts: their elements.
    """
    channel, (mine,) = call.channel, call.tensors

    def fill(number: int) -> None:
        move(channel.address(channel.input(channel.me, number)), mine.data_ptr(), mine.nbytes)

    number = yield from _meet(call, fill)
    parts = [mine] * channel.size
    for member in channel.others:
        size = counts[member] * mine.dtype.itemsize
        slot = channel.input(member, number)
        parts[member] = channel.view(slot, size, mine.dtype, shapes[member])
    answers = tuple([found.clone() for found in parts])
    channel.inputs.release()
    return answers


def barrier(call: Call) -> Steps:
    """Nothing but the round."""
    yield from _meet(call, lambda _: None)
    call.channel.inputs.release()
    return ()


def _meet(call: Call, fill: Callable[[int], None]) -> Generator[Need | None, None, int]:
    """One round that holds everything; `fill`, given its number in the channel, copies in.

    Returns:
        The round's number, once all have posted it; the caller takes what it needs, and releases.
    """
    channel, stream = call.channel, call.channel.inputs
    while stream.next is None:
        yield None
    number = stream.next
    stream.next = number + 1
    while not stream.may_post(number):
        yield stream.takes, number - SLOTS + 1
    channel.announce(number, call.meaning, 1, ())
    fill(number)
    stream.publish()
    while not stream.may_take(number, stream.everyone):
        yield stream.everyone, number + 1
    compare(call, number, channel.others)
    return number


def part(channel: Channel) -> int:
    """Bytes of a slot that are for one member, when each gets something else."""
    return channel.capacity // (channel.size - 1) // LINE * LINE


def place(sender: int, receiver: int) -> int:
    """Which part of the sender's slot is for `receiver`; nobody sends to itself."""
    return receiver if receiver < sender else receiver - 1
