"""The collectives over a channel: which bytes each round of them carries.

Large messages go through the slots in pieces small enough to stay in cache, so that copying in,
reducing and copying out overlap between ranks. Sums add up in group order, so they are those of
`comm/local.py` to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from meshwright.comm import atonce
from meshwright.comm.atonce import part, place
from meshwright.comm.cargo import Cargo, move, views
from meshwright.comm.channel import Channel
from meshwright.comm.pump import Act, Call, Steps, even, fold, pump
from meshwright.comm.shares import reduce_in_shares
from meshwright.errors import InternalError

__all__ = ["begin"]

# Up to here every member reduces everything itself: one phase less to wait for.
_DIRECT = 1 << 15
_PAIR = 1 << 18


def begin(call: Call) -> Steps:
    """The steps of a collective."""
    return _STEPS[call.request.op](call)


def _all_reduce(call: Call) -> Steps:
    size = sum([tensor.nbytes for tensor in call.tensors])
    pair = call.channel.size == 2
    if size <= min(_PAIR if pair else _DIRECT, call.channel.capacity):
        return atonce.reduce(call)
    return _reduce_directly(call) if pair else reduce_in_shares(call)


def _reduce_directly(call: Call) -> Steps:
    """Every member reduces all inputs."""
    channel, how = call.channel, call.request.reduce
    cargo, dtype = Cargo(call.tensors), call.tensors[0].dtype
    size = cargo.size
    piece = even(size, channel.capacity)
    rounds = max(1, -(-size // piece))
    donated = call.request.donate
    answers = call.tensors if donated else call.like(call.tensors)
    target = cargo if donated else Cargo(answers)

    def post(k: int, number: int) -> None:
        slot = channel.address(channel.input(channel.me, number))
        cargo.load(slot, k * piece, min((k + 1) * piece, size))

    def take(k: int, number: int) -> None:
        low, high = k * piece, min((k + 1) * piece, size)
        mine = cargo.part(low, high)
        # Not straight into the answer: additions read memory before they fill it, copies do not.
        into = mine if donated else channel.scratch(high - low, dtype)
        target.put(fold(channel.operands(number, mine), how, into), low, high)

    yield from pump(call, rounds, post, take)
    return answers


def _reduce_scatter(call: Call) -> Steps:
    limit = min(_DIRECT, part(call.channel))
    sizes = [tensor.nbytes for tensor in call.tensors]
    small = len(sizes) == call.channel.size and max(sizes) <= limit
    return atonce.scatter(call) if small else _scatter_in_pieces(call)


def _scatter_in_pieces(call: Call) -> Steps:
    channel, how, me = call.channel, call.request.reduce, call.channel.me
    share, cargoes = part(channel), _cargoes(call.tensors, channel.size)
    dtype, mine = call.tensors[0].dtype, cargoes[me]
    rounds = max(1, -(-max(cargo.size for cargo in cargoes) // share))
    answers = call.like(_of(call.tensors, me, channel.size))
    target = Cargo(answers)

    def take(k: int, number: int) -> None:
        low, high = k * share, min((k + 1) * share, mine.size)
        if low < high:
            own = mine.part(low, high)
            parts = [
                own
                if member == me
                else channel.view(
                    channel.input(member, number) + place(member, me) * share, own.nbytes, dtype
                )
                for member in range(channel.size)
            ]
            target.put(fold(parts, how, channel.scratch(high - low, dtype)), low, high)

    yield from pump(call, rounds, _sending(channel, cargoes, share), take)
    return answers


def _all_gather(call: Call) -> Steps:
    tensors, channel = call.tensors, call.channel
    shapes = call.request.shapes or tuple([tuple(t.shape) for t in tensors]) * channel.size
    counts = [math.prod(shape) for shape in shapes]
    limit = min(_DIRECT, channel.capacity)
    if len(tensors) == 1 and max(counts) * tensors[0].dtype.itemsize <= limit:
        return atonce.gather(call, shapes, counts)
    return _gather_in_pieces(call, shapes)


def _gather_in_pieces(call: Call, shapes: Sequence[tuple[int, ...]]) -> Steps:
    channel, me, tensors = call.channel, call.channel.me, call.tensors
    piece, cargo, k = channel.capacity, Cargo(tensors), len(tensors)
    answers = call.request.into or _side_by_side(call, shapes)
    targets = _cargoes(answers, channel.size)
    mine = zip(answers[me * k : (me + 1) * k], tensors, strict=True)
    there = all(answer.data_ptr() == tensor.data_ptr() for answer, tensor in mine)
    rounds = max(1, -(-max(target.size for target in targets) // piece))

    def post(r: int, number: int) -> None:
        low, high = r * piece, min((r + 1) * piece, cargo.size)
        slot = channel.address(channel.input(me, number))
        cargo.load(slot, low, high)
        if not there:
            targets[me].unload(slot, low, high)

    def take(r: int, number: int) -> None:
        for member in channel.others:
            slot = channel.address(channel.input(member, number))
            targets[member].unload(slot, r * piece, min((r + 1) * piece, targets[member].size))

    yield from pump(call, rounds, post, take)
    return answers


def _side_by_side(call: Call, shapes: Sequence[tuple[int, ...]]) -> tuple[Tensor, ...]:
    """Memory for a gather: where the parts of a tensor are rows, together they are the whole."""
    k, members = len(call.tensors), call.channel.size
    order = [member * k + j for j in range(k) for member in range(members)]
    whole = call.pool.empty((sum(map(math.prod, shapes)),), call.tensors[0].dtype)
    laid = dict(zip(order, views(whole, [shapes[place] for place in order]), strict=True))
    return tuple([laid[place] for place in range(len(order))])


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
    """Send as many tensors to each member, and receive tensors of `shapes`, as many from each."""
    channel, me, share = call.channel, call.channel.me, part(call.channel)
    whole = call.pool.empty((sum(map(math.prod, shapes)),), outgoing[0].dtype)
    answers = views(whole, shapes)
    for answer, own in zip(
        _of(answers, me, channel.size), _of(outgoing, me, channel.size), strict=True
    ):
        answer.copy_(own.view(answer.shape))
    sources, targets = _cargoes(outgoing, channel.size), _cargoes(answers, channel.size)
    rounds = max(1, -(-max(source.size for source in sources) // share))

    def take(k: int, number: int) -> None:
        for member in channel.others:
            target = targets[member]
            if k == 0:
                _expect(call, member, number, target.size)
            slot = channel.input(member, number) + place(member, me) * share
            target.unload(channel.address(slot), k * share, min((k + 1) * share, target.size))

    post = _sending(channel, sources, share)
    counts = [source.size for source in sources]
    yield from pump(call, rounds, post, take, channel.others, counts)
    return answers


_STEPS: dict[str, Callable[[Call], Steps]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "broadcast": _broadcast,
    "permute": _permute,
    "barrier": atonce.barrier,
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


def _sending(channel: Channel, cargoes: Sequence[Cargo], share: int) -> Act:
    """Post: each member's piece of its cargo, in its place of the slot."""
    me = channel.me

    def post(k: int, number: int) -> None:
        slot = channel.address(channel.input(me, number))
        for member in channel.others:
            cargo, target = cargoes[member], slot + place(me, member) * share
            cargo.load(target, k * share, min((k + 1) * share, cargo.size))

    return post


def _of(tensors: tuple[Tensor, ...], member: int, members: int) -> tuple[Tensor, ...]:
    """What is a member's, of a list that goes member after member."""
    k = len(tensors) // members
    return tensors[member * k : (member + 1) * k]


def _cargoes(tensors: tuple[Tensor, ...], members: int) -> list[Cargo]:
    """The cargo of each member, of a list that goes member after member."""
    return [Cargo(_of(tensors, member, members)) for member in range(members)]
