"""The collectives over a channel: which bytes each round of them carries.

Large messages go through the slots in pieces small enough to stay in cache, so that copying in,
reducing and copying out overlap between ranks. Sums add up in group order, so they are those of
`comm/local.py` to the last bit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

from torch import Tensor

from meshwright.comm.channel import SLOTS, Channel
from meshwright.comm.pump import LINE, Act, Call, Steps, compare, even, fold, move, pump
from meshwright.comm.shares import reduce_in_shares
from meshwright.errors import InternalError

__all__ = ["begin"]

# Up to here every member reduces everything itself: one phase less to wait for.
_DIRECT = 1 << 15
_PAIR = 1 << 17


def begin(call: Call) -> Steps:
    """The steps of a collective."""
    return _STEPS[call.request.op](call)


def _all_reduce(call: Call) -> Steps:
    size = call.tensors[0].nbytes
    if size <= (_PAIR if call.channel.size == 2 else _DIRECT):
        return _reduce_at_once(call)
    return _reduce_directly(call) if call.channel.size == 2 else reduce_in_shares(call)


def _reduce_at_once(call: Call) -> Steps:
    """What `_reduce_directly` does, in one round and with few words: most reductions are small."""
    channel, stream = call.channel, call.channel.inputs
    (tensor,) = call.tensors
    while stream.next is None:
        yield None
    number = stream.next
    stream.next = number + 1
    while not stream.may_post(number):
        yield stream.takes, number - SLOTS + 1
    channel.announce(number, call.meaning, 1, ())
    move(channel.address(channel.input(channel.me, number)), tensor.data_ptr(), tensor.nbytes)
    stream.publish()
    while not stream.may_take(number, stream.everyone):
        yield stream.everyone, number + 1
    compare(call, number, channel.others)
    parts = channel.operands(number, tensor)
    total = fold(parts, call.request.reduce)
    stream.release()
    return (total,)


def _reduce_directly(call: Call) -> Steps:
    """Every member reduces all inputs."""
    channel, how = call.channel, call.request.reduce
    (tensor,) = call.tensors
    dtype, source, size = tensor.dtype, tensor.data_ptr(), tensor.nbytes
    piece = even(size, channel.capacity)
    rounds = max(1, -(-size // piece))
    mine = tensor.view(-1).split(piece // dtype.itemsize)
    total = call.pool.empty(tensor.shape, dtype)
    totals = total.view(-1).split(piece // dtype.itemsize)

    def post(k: int, number: int) -> None:
        count = min(piece, size - k * piece)
        move(channel.address(channel.input(channel.me, number)), source + k * piece, count)

    def take(k: int, number: int) -> None:
        parts = [
            mine[k]
            if member == channel.me
            else channel.view(channel.input(member, number), mine[k].nbytes, dtype)
            for member in range(channel.size)
        ]
        fold(parts, how, totals[k])

    yield from pump(call, rounds, post, take)
    return (total,)


def _reduce_scatter(call: Call) -> Steps:
    channel, how, me = call.channel, call.request.reduce, call.channel.me
    share, tensors = _part(channel), call.tensors
    dtype, shape = tensors[me].dtype, tensors[me].shape
    rounds = max(1, -(-max(tensor.nbytes for tensor in tensors) // share))
    mine = tensors[me].view(-1).split(share // dtype.itemsize)
    total = call.pool.empty(shape, dtype)
    totals = total.view(-1).split(share // dtype.itemsize)

    def take(k: int, number: int) -> None:
        if k < len(mine):
            parts = [
                mine[k]
                if member == me
                else channel.view(
                    channel.input(member, number) + _place(member, me) * share,
                    mine[k].nbytes,
                    dtype,
                )
                for member in range(channel.size)
            ]
            fold(parts, how, totals[k])

    yield from pump(call, rounds, _sending(channel, tensors, share), take)
    return (total,)


def _all_gather(call: Call) -> Steps:
    channel, me = call.channel, call.channel.me
    (tensor,) = call.tensors
    piece, dtype, source = channel.capacity, tensor.dtype, tensor.data_ptr()
    shapes = call.request.shapes or (tuple(tensor.shape),) * channel.size
    counts = [math.prod(shape) for shape in shapes]
    whole = call.pool.empty((sum(counts),), dtype)
    sizes = [count * dtype.itemsize for count in counts]
    starts = [whole.data_ptr() + start for start in itertools.accumulate([0, *sizes])]
    rounds = max(1, -(-max(sizes) // piece))

    def post(k: int, number: int) -> None:
        count = min(piece, sizes[me] - k * piece)
        if count > 0:
            slot = channel.address(channel.input(me, number))
            move(slot, source + k * piece, count)
            move(starts[me] + k * piece, slot, count)

    def take(k: int, number: int) -> None:
        for member in channel.others:
            count = min(piece, sizes[member] - k * piece)
            if count > 0:
                slot = channel.address(channel.input(member, number))
                move(starts[member] + k * piece, slot, count)

    yield from pump(call, rounds, post, take)
    return tuple(part.view(shape) for part, shape in zip(whole.split(counts), shapes, strict=True))


def _broadcast(call: Call) -> Steps:
    channel, root = call.channel, call.request.root
    (tensor,) = call.tensors
    piece, size, source = channel.capacity, tensor.nbytes, tensor.data_ptr()
    answer = call.pool.empty(tensor.shape, tensor.dtype)
    target, mine = answer.data_ptr(), channel.me == root

    def post(k: int, number: int) -> None:
        if mine:
            slot, count = channel.address(channel.input(root, number)), min(piece, size - k * piece)
            move(slot, source + k * piece, count)
            move(target + k * piece, slot, count)

    def take(k: int, number: int) -> None:
        if not mine:
            slot, count = channel.address(channel.input(root, number)), min(piece, size - k * piece)
            move(target + k * piece, slot, count)

    senders = () if mine else (root,)
    yield from pump(call, max(1, -(-size // piece)), post, take, senders)
    return (answer,)


def _all_to_all(call: Call) -> Steps:
    shapes = call.request.shapes or tuple(tuple(tensor.shape) for tensor in call.tensors)
    return (yield from _exchange(call, call.tensors, shapes))


def _permute(call: Call) -> Steps:
    channel, (tensor,), root = call.channel, call.tensors, call.request.root
    sender, receiver = (channel.me - root) % channel.size, (channel.me + root) % channel.size
    nothing = tensor.new_empty(0)
    shape = call.request.shapes[sender] if call.request.shapes else tuple(tensor.shape)
    outgoing = tuple(tensor if m == receiver else nothing for m in range(channel.size))
    shapes = tuple(shape if m == sender else (0,) for m in range(channel.size))
    answers = yield from _exchange(call, outgoing, shapes)
    return (answers[sender],)


def _exchange(call: Call, outgoing: tuple[Tensor, ...], shapes: Sequence[tuple[int, ...]]) -> Steps:
    """Send one tensor to each member and receive one of each of `shapes` from each."""
    channel, me, share = call.channel, call.channel.me, _part(call.channel)
    dtype = outgoing[me].dtype
    answers = tuple(call.pool.empty(shape, dtype) for shape in shapes)
    answers[me].copy_(outgoing[me].view(answers[me].shape))
    targets = [answer.data_ptr() for answer in answers]
    sizes = [answer.nbytes for answer in answers]
    rounds = max(1, -(-max(tensor.nbytes for tensor in outgoing) // share))

    def take(k: int, number: int) -> None:
        for member in channel.others:
            if k == 0:
                _expect(call, member, number, sizes[member])
            count = min(share, sizes[member] - k * share)
            if count > 0:
                slot = channel.input(member, number) + _place(member, me) * share
                move(targets[member] + k * share, channel.address(slot), count)

    post = _sending(channel, outgoing, share)
    counts = [tensor.nbytes for tensor in outgoing]
    yield from pump(call, rounds, post, take, channel.others, counts)
    return answers


def _barrier(call: Call) -> Steps:
    def nothing(_k: int, _number: int) -> None:
        pass

    yield from pump(call, 1, nothing, nothing)
    return ()


_STEPS: dict[str, Callable[[Call], Steps]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "broadcast": _broadcast,
    "permute": _permute,
    "barrier": _barrier,
}


def _expect(call: Call, member: int, number: int, size: int) -> None:
    """See that a member sends as many bytes as are expected of it."""
    sent = call.channel.announced(member, number)[1]
    if sent != size:
        ranks, request = call.channel.ranks, call.request
        raise InternalError(
            f"{request.op} over {request.group.axis} ({request.label}): rank {ranks[member]} sends "
            f"{sent} bytes to rank {ranks[call.channel.me]}, which expects {size}"
        )


def _sending(channel: Channel, tensors: Sequence[Tensor], share: int) -> Act:
    """Post: each member's piece of `tensors`, in its place of the slot."""
    me = channel.me
    sends = [
        (_place(me, member) * share, tensors[member].data_ptr(), tensors[member].nbytes)
        for member in channel.others
    ]

    def post(k: int, number: int) -> None:
        slot = channel.address(channel.input(me, number))
        for place, source, size in sends:
            count = min(share, size - k * share)
            if count > 0:
                move(slot + place, source + k * share, count)

    return post


def _part(channel: Channel) -> int:
    """Bytes of a slot that are for one member, when each gets something else."""
    return channel.capacity // (channel.size - 1) // LINE * LINE


def _place(sender: int, receiver: int) -> int:
    """Which part of the sender's slot is for `receiver`; nobody sends to itself."""
    return receiver if receiver < sender else receiver - 1
