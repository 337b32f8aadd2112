"""The collectives of one gloo process group: a `Start` becomes gloo's works and how to finish them.

Reductions add in group order wherever that costs no more than gloo's own ring, so that they match
`comm/local.py` to the last bit; large sums use the ring, whose order is fixed for a world size.
Everything that only moves data moves bytes, so every dtype goes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol, cast

import torch
from torch import Tensor
from torch.distributed import BroadcastOptions, ProcessGroupGloo, Store, Work  # type: ignore[attr-defined]

from meshwright.comm.base import Reduction, Start
from meshwright.comm.cargo import views

__all__ = ["Link", "Pending", "connect", "start"]

# Below this many bytes in all, gathering and adding up costs less than a ring's many small turns.
_GATHER_LIMIT = 1 << 16
_RING_DTYPES = frozenset(
    {torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32}
)


@dataclass(frozen=True, slots=True, eq=False)
class Pending:
    """Works under way, and what makes their answer once all are done."""

    works: tuple[Work, ...]
    finish: Callable[[], tuple[Tensor, ...]]


class _Gloo(Protocol):
    """What is used of `ProcessGroupGloo`, whose published types leave it out."""

    def allreduce(self, tensors: list[Tensor]) -> Work: ...
    def broadcast(self, tensors: list[Tensor], opts: BroadcastOptions) -> Work: ...
    def _allgather_base(self, output: Tensor, input_: Tensor) -> Work: ...
    def send(self, tensors: list[Tensor], to: int, tag: int) -> Work: ...
    def recv(self, tensors: list[Tensor], source: int, tag: int) -> Work: ...
    def alltoall_base(
        self, output: Tensor, input_: Tensor, received: list[int], sent: list[int]
    ) -> Work: ...


@dataclass(frozen=True, slots=True, eq=False)
class Link:
    """A connected group, and this member's place among its `size` members."""

    gloo: _Gloo
    index: int
    size: int


def connect(
    store: Store, index: int, size: int, device: ProcessGroupGloo.Device, seconds: float
) -> Link:
    """Connect to the other members of a group, which must all be about to do the same.

    Args:
        store: where members find each other's addresses; private to this group.
        index: this member's place in the group.
        size: how many members there are.
        device: which address gloo listens on.
        seconds: when gloo itself gives up; longer than any deadline of ours.
    """
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # noqa: SLF001
    options._devices = [device]  # noqa: SLF001
    options._timeout = timedelta(seconds=seconds)  # noqa: SLF001
    gloo = cast(_Gloo, ProcessGroupGloo(store, index, size, options))
    return Link(gloo, index, size)


def start(link: Link, request: Start) -> Pending:
    """Begin `request`, whose group `link` connects."""
    return _STARTS[request.op](link, request)


def _all_reduce(link: Link, request: Start) -> Pending:
    shapes, flat = [tensor.shape for tensor in request.tensors], _flat(request.tensors)
    moved = link.size * flat.nbytes
    # gloo's max and min lose NaN; torch's keep it, as one device would.
    ring = request.reduce == "sum" and flat.dtype in _RING_DTYPES and moved > _GATHER_LIMIT
    if ring:
        return Pending((link.gloo.allreduce([flat]),), lambda: views(flat, shapes))
    works, parts = _gather_equal(link, flat)
    return Pending(works, lambda: views(_reduced(parts, request.reduce), shapes))


def _all_gather(link: Link, request: Start) -> Pending:
    tensors, k = request.tensors, len(request.tensors)
    shapes = request.shapes or tuple([tuple(tensor.shape) for tensor in tensors]) * link.size
    theirs = [shapes[member * k : (member + 1) * k] for member in range(link.size)]
    counts = [sum(map(math.prod, member)) for member in theirs]
    mine = _flat(tensors)
    if len(set(counts)) == 1:
        works, parts = _gather_equal(link, mine)
    else:
        parts = tuple(
            mine if member == link.index else mine.new_empty(count)
            for member, count in enumerate(counts)
        )
        works = _broadcasts(link, enumerate(parts))

    def finish() -> tuple[Tensor, ...]:
        pairs = zip(parts, theirs, strict=True)
        return tuple(itertools.chain.from_iterable(views(part, member) for part, member in pairs))

    return Pending(works, finish)


def _reduce_scatter(link: Link, request: Start) -> Pending:
    tensors, k = request.tensors, len(request.tensors) // link.size
    mine = [tuple(tensor.shape) for tensor in tensors[link.index * k : (link.index + 1) * k]]
    flat = tuple(_flat(tensors[m * k : (m + 1) * k]) for m in range(link.size))
    exchange = _exchange(link, flat, (tuple(flat[link.index].shape),) * link.size)
    return Pending(exchange.works, lambda: views(_reduced(exchange.finish(), request.reduce), mine))


def _all_to_all(link: Link, request: Start) -> Pending:
    shapes = request.shapes or tuple(tuple(tensor.shape) for tensor in request.tensors)
    return _exchange(link, request.tensors, shapes)


def _broadcast(link: Link, request: Start) -> Pending:
    tensor = request.tensors[0].detach().clone(memory_format=torch.contiguous_format)
    return Pending(_broadcasts(link, [(request.root, tensor)]), lambda: (tensor,))


def _permute(link: Link, request: Start) -> Pending:
    (tensor,) = request.tensors
    size = link.size
    sender, receiver = (link.index - request.root) % size, (link.index + request.root) % size
    nothing = tensor.new_empty(0)
    outgoing = [tensor if member == receiver else nothing for member in range(size)]
    expected = request.shapes[sender] if request.shapes else tuple(tensor.shape)
    shapes = tuple(expected if member == sender else (0,) for member in range(size))
    exchange = _exchange(link, outgoing, shapes)
    return Pending(exchange.works, lambda: (exchange.finish()[sender],))


def _barrier(link: Link, _request: Start) -> Pending:
    works, _ = _gather_equal(link, torch.zeros(1, dtype=torch.uint8))
    return Pending(works, lambda: ())


_STARTS: dict[str, Callable[[Link, Start], Pending]] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "broadcast": _broadcast,
    "permute": _permute,
    "barrier": _barrier,
}


def _gather_equal(link: Link, tensor: Tensor) -> tuple[tuple[Work, ...], tuple[Tensor, ...]]:
    """Gather tensors of one shape; the parts are views of one buffer, filled when works end."""
    buffer = torch.empty((link.size, *tensor.shape), dtype=tensor.dtype)
    if tensor.numel() == 0:
        return (), tuple(buffer)
    work = link.gloo._allgather_base(_bytes(buffer), _bytes(tensor))  # noqa: SLF001
    return (work,), tuple(buffer)


def _broadcasts(link: Link, parts: Iterable[tuple[int, Tensor]]) -> tuple[Work, ...]:
    works = []
    for root, part in parts:
        if part.numel():
            options = BroadcastOptions()
            options.rootRank = root
            works.append(link.gloo.broadcast([_bytes(part)], options))
    return tuple(works)


def _exchange(link: Link, outgoing: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> Pending:
    """Send as many tensors to each member, and receive tensors of `shapes`, as many from each."""
    sent, k = [_bytes(tensor) for tensor in outgoing], len(outgoing) // link.size
    sizes = [math.prod(shape) * outgoing[0].element_size() for shape in shapes]
    received = torch.empty(sum(sizes), dtype=torch.uint8)
    work = link.gloo.alltoall_base(
        received,
        torch.cat(sent),
        _by_member(sizes, k),
        _by_member([part.numel() for part in sent], k),
    )
    return Pending((work,), lambda: views(received.view(outgoing[0].dtype), shapes))


def _by_member(sizes: Sequence[int], k: int) -> list[int]:
    """The sum of every member's `k` sizes."""
    return [sum(sizes[place : place + k]) for place in range(0, len(sizes), k)]


def _reduced(parts: tuple[Tensor, ...], how: Reduction) -> Tensor:
    """The reduction of `parts` in group order."""
    total = parts[0].clone()
    for part in parts[1:]:
        if how == "sum":
            total += part
        elif how == "max":
            torch.maximum(total, part, out=total)
        else:
            torch.minimum(total, part, out=total)
    return total


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """A copy of the tensors, end to end."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _bytes(tensor: Tensor) -> Tensor:
    """The bytes of `tensor`, as one dim; a view where it is contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
