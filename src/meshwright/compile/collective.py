"""A partitioned program's moves between layouts, on tensors: packed for the wire, and unpacked.

`comm.all_gather` and its like become a `Start` and what to make of the tensors that `Wait` answers;
`comm.slice` and `comm.mask` need no other rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meshwright.comm.base import Group, Reduction, Start
from meshwright.program.program import Op

__all__ = ["Wire", "local_move", "narrow", "start", "unpack", "wire"]

_Slab = tuple[int, int, int, tuple[int, ...], tuple[int, ...]]
"""(dim, outer, unit, starts, lengths) as `program.layout.Slab`."""


def narrow(tensor: Tensor, slab: _Slab, member: int) -> Tensor:
    """The part of `tensor`, whole along the slab's factor, that belongs to `member`."""
    part = _seen(tensor, slab, member)
    return part if slab[1] == 1 else part.reshape(_part_shape(tensor.shape, slab, member))


def _seen(tensor: Tensor, slab: _Slab, member: int) -> Tensor:
    """A view of the part; where the slab is of a factor, its dim is three: outer, n, unit."""
    dim, outer, unit, starts, lengths = slab
    if outer == 1:
        return tensor.narrow(dim, starts[member] * unit, lengths[member] * unit)
    shape = tensor.shape
    seen = tensor.view(*shape[:dim], outer, sum(lengths), unit, *shape[dim + 1 :])
    return seen.narrow(dim + 1, starts[member], lengths[member])


def _join(parts: Sequence[Tensor], slab: _Slab) -> Tensor:
    """The inverse of `narrow` over all members."""
    dim, outer, unit, _, lengths = slab
    if dim == 0 and outer == 1 and _end_to_end(parts):
        return _whole(parts)
    if outer == 1:
        return torch.cat(list(parts), dim)
    shape = parts[0].shape
    seen = [
        part.reshape(*shape[:dim], outer, length, unit, *shape[dim + 1 :])
        for part, length in zip(parts, lengths, strict=True)
    ]
    joined = torch.cat(seen, dim + 1)
    return joined.reshape(*shape[:dim], outer * sum(lengths) * unit, *shape[dim + 1 :])


def _lay(parts: Sequence[Tensor], slab: _Slab, whole: Tensor) -> None:
    """As `_join`, into `whole`; parts that came straight there stay."""
    for member, part in enumerate(parts):
        place = _seen(whole, slab, member)
        if place.data_ptr() != part.data_ptr():
            place.copy_(part.reshape(place.shape))


def _end_to_end(parts: Sequence[Tensor]) -> bool:
    """Whether each part begins in memory where the one before it ends, as drivers answer."""
    storage, end = parts[0].untyped_storage().data_ptr(), parts[0].data_ptr()
    for part in parts:
        if part.untyped_storage().data_ptr() != storage or part.data_ptr() != end:
            return False
        end += part.nbytes
    return all(part.is_contiguous() for part in parts)


def _whole(parts: Sequence[Tensor]) -> Tensor:
    """Parts that lie end to end as one tensor, in the same memory."""
    rows, first = sum(part.shape[0] for part in parts), parts[0]
    shape = (rows, *first.shape[1:])
    strides = torch.empty(shape, device="meta").stride()
    return first.as_strided(shape, strides, first.storage_offset())


def _part_shape(shape: Sequence[int], slab: _Slab, member: int) -> tuple[int, ...]:
    dim, outer, unit, _, lengths = slab
    return (*shape[:dim], outer * lengths[member] * unit, *shape[dim + 1 :])


@dataclass(frozen=True, slots=True)
class Wire:
    """A bucket, ready to be started often.

    Attributes:
        op: of all its collectives.
        slabs: per collective, how its tensor is cut, before and after.
        reduction: of an all-reduce or reduce-scatter.
        label: what it serves.
        donate: whether nobody needs the operands of its all-reduces.
        into: names of the values in whose memory gathers may leave what they make, where they may.
    """

    op: str
    slabs: tuple[tuple[_Slab, ...], ...]
    reduction: Reduction
    label: str
    donate: bool
    into: tuple[str, ...]


def wire(ops: Sequence[Op]) -> Wire:
    """Look at a bucket of collectives of one kind."""
    notes = [dict(op.kwargs) for op in ops]
    into = tuple(found for note in notes if isinstance(found := note.get("into"), str))
    return Wire(
        ops[0].name.removeprefix("comm."),
        tuple(_slabs(op) for op in ops),
        _reduction(ops[0]),
        _label(ops),
        all(note.get("donate") is True for note in notes),
        into if len(into) == len(ops) else (),
    )


def start(
    bucket: Wire, tensors: Sequence[Tensor], group: Group, index: int, into: Sequence[Tensor] = ()
) -> Start:
    """The request that begins a bucket.

    Args:
        bucket: what to begin.
        tensors: the operand of each collective; then of each exchange, how many rows go to each
            member and come from each.
        group: of the ranks that take part.
        index: of this one among them.
        into: the values that `bucket.into` names.
    """
    label, members, reduction = bucket.label, range(len(group.ranks)), bucket.reduction
    if bucket.op == "all_reduce":
        whole = tuple([tensor.contiguous() for tensor in tensors])
        return Start("all_reduce", group, whole, reduction, label=label, donate=bucket.donate)
    if bucket.op == "exchange":
        return _exchange(bucket, tensors, group)
    pairs = list(zip(tensors, bucket.slabs, strict=True))
    if bucket.op == "permute":
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        sizes = [
            sum(math.prod(_part_shape(t.shape, cut[0], k)) for t, cut in pairs) for k in members
        ]
        sent = tuple((size,) for size in sizes)
        return Start("permute", group, (flat,), shapes=sent, root=1, label=label)
    if bucket.op == "all_gather":
        shapes = tuple(_part_shape(t.shape, cut[0], k) for k in members for t, cut in pairs)
        whole = tuple([tensor.contiguous() for tensor in tensors])
        places = _places(into, bucket.slabs, members)
        return Start("all_gather", group, whole, shapes=shapes, label=label, into=places)
    parts = tuple([narrow(t, cut[-1], k).contiguous() for k in members for t, cut in pairs])
    if bucket.op == "reduce_scatter":
        return Start("reduce_scatter", group, parts, reduction, label=label)
    assert bucket.op == "all_to_all", bucket.op
    count = len(tensors)
    mine = zip(parts[index * count : (index + 1) * count], bucket.slabs, strict=True)
    kept = [(part.shape, cut[0]) for part, cut in mine]
    shapes = tuple(_part_shape(shape, cut, k) for k in members for shape, cut in kept)
    return Start("all_to_all", group, parts, shapes=shapes, label=label)


def _exchange(bucket: Wire, tensors: Sequence[Tensor], group: Group) -> Start:
    """Rows, as many for each member as was counted."""
    count, members = len(bucket.slabs), range(len(group.ranks))
    rows, counts = tensors[:count], [tensor.tolist() for tensor in tensors[count:]]
    cut = [t.contiguous().split(sent) for t, sent in zip(rows, counts[::2], strict=True)]
    parts = tuple([part[k] for k in members for part in cut])
    theirs = list(zip(rows, counts[1::2], strict=True))
    shapes = tuple([(received[k], *t.shape[1:]) for k in members for t, received in theirs])
    return Start("all_to_all", group, parts, shapes=shapes, label=bucket.label)


def _places(
    into: Sequence[Tensor], slabs: Sequence[tuple[_Slab, ...]], members: range
) -> tuple[Tensor, ...]:
    """Where each member's parts lie in whole tensors; nothing if some part is in pieces."""
    pairs = list(zip(into, slabs, strict=bool(into)))
    found = tuple([narrow(whole, cut[0], k) for k in members for whole, cut in pairs])
    return found if all(part.is_contiguous() for part in found) else ()


def unpack(
    bucket: Wire, tensors: Sequence[Tensor], into: Sequence[Tensor] = ()
) -> tuple[Tensor, ...]:
    """The results of a bucket from what `Wait` answered; in the memory of `into`, if given."""
    if bucket.op == "exchange":
        count = len(bucket.slabs)
        return tuple([torch.cat(list(tensors[k::count])) for k in range(count)])
    if bucket.op == "permute":
        shapes: list[Any] = [cut[1] for cut in bucket.slabs]
        parts = tensors[0].split([math.prod(shape) for shape in shapes])
        return tuple([part.view(shape) for part, shape in zip(parts, shapes, strict=True)])
    if bucket.op in ("all_gather", "all_to_all"):
        count = len(bucket.slabs)
        if into:
            for k, (whole, cut) in enumerate(zip(into, bucket.slabs, strict=True)):
                _lay(tensors[k::count], cut[0], whole)
            return tuple(into)
        return tuple([_join(tensors[k::count], cut[0]) for k, cut in enumerate(bucket.slabs)])
    return tuple(tensors)


def _label(ops: Sequence[Op]) -> str:
    """What a bucket serves: its first value or source line, and how many more there are."""
    first = dict(ops[0].kwargs).get("value") or ops[0].source
    assert isinstance(first, str)
    return first if len(ops) == 1 else f"{first} and {len(ops) - 1} more"


def _slabs(op: Op) -> tuple[_Slab, ...]:
    """How a collective's tensors are cut: before, and after."""
    found: tuple[Any, ...] = op.args[2:]
    return tuple(arg for arg in found if isinstance(arg, tuple))


def _reduction(op: Op) -> Reduction:
    found: Any = op.args[-1] if op.name in ("comm.all_reduce", "comm.reduce_scatter") else "sum"
    assert found in ("sum", "max", "min"), found
    reduction: Reduction = found
    return reduction


def local_move(op: Op, tensor: Tensor, coordinates: Mapping[str, int]) -> Tensor:
    """`comm.slice` and `comm.mask` on the rank at `coordinates`."""
    args: tuple[Any, ...] = op.args[1:]
    index = coordinates[args[0]]
    if op.name == "comm.slice":
        # What follows may be a view, which the whole tensor allowed and a cut one would not.
        return narrow(tensor, args[1], index).contiguous()
    if index == 0:
        return tensor
    return torch.full_like(tensor, _neutral(args[1], tensor.dtype))


def _neutral(reduction: str, dtype: torch.dtype) -> float:
    """What changes nothing under the reduction."""
    if reduction == "sum":
        return 0
    if dtype == torch.bool:
        return reduction == "min"
    if dtype.is_floating_point:
        return -math.inf if reduction == "max" else math.inf
    info = torch.iinfo(dtype)
    return info.min if reduction == "max" else info.max
