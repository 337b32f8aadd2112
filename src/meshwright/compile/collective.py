"""A partitioned program's moves between layouts, on tensors: packed for the wire, and unpacked.

`comm.all_gather` and its like become a `Start` and what to make of the tensors that `Wait` answers;
`comm.slice` and `comm.mask` need no other rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from meshwright.comm.base import Group, Start
from meshwright.program.program import Op

__all__ = ["local_move", "narrow", "start", "unpack"]

_Slab = tuple[int, int, int, tuple[int, ...], tuple[int, ...]]
"""(dim, outer, unit, starts, lengths) as `program.layout.Slab`."""


def narrow(tensor: Tensor, slab: _Slab, member: int) -> Tensor:
    """The part of `tensor`, whole along the slab's factor, that belongs to `member`."""
    dim, outer, unit, starts, lengths = slab
    if outer == 1:
        return tensor.narrow(dim, starts[member] * unit, lengths[member] * unit)
    shape = tensor.shape
    seen = tensor.reshape(*shape[:dim], outer, sum(lengths), unit, *shape[dim + 1 :])
    part = seen.narrow(dim + 1, starts[member], lengths[member])
    return part.reshape(*shape[:dim], outer * lengths[member] * unit, *shape[dim + 1 :])


def _join(parts: Sequence[Tensor], slab: _Slab) -> Tensor:
    """The inverse of `narrow` over all members."""
    dim, outer, unit, _, lengths = slab
    if outer == 1:
        return torch.cat(list(parts), dim)
    shape = parts[0].shape
    seen = [
        part.reshape(*shape[:dim], outer, length, unit, *shape[dim + 1 :])
        for part, length in zip(parts, lengths, strict=True)
    ]
    joined = torch.cat(seen, dim + 1)
    return joined.reshape(*shape[:dim], outer * sum(lengths) * unit, *shape[dim + 1 :])


def _part_shape(shape: Sequence[int], slab: _Slab, member: int) -> tuple[int, ...]:
    dim, outer, unit, _, lengths = slab
    return (*shape[:dim], outer * lengths[member] * unit, *shape[dim + 1 :])


def start(op: Op, tensor: Tensor, group: Group, index: int) -> Start:
    """The request that begins collective `op` on `tensor` of the group's member `index`."""
    args: tuple[Any, ...] = op.args[2:]
    label = dict(op.kwargs).get("value") or op.source
    name = op.name.removeprefix("comm.")
    members = range(len(group.ranks))
    assert isinstance(label, str)
    match name:
        case "all_reduce":
            return Start("all_reduce", group, (tensor.contiguous(),), args[0], label=label)
        case "all_gather":
            shapes = tuple(_part_shape(tensor.shape, args[0], k) for k in members)
            return Start("all_gather", group, (tensor.contiguous(),), shapes=shapes, label=label)
        case "reduce_scatter":
            parts = tuple(narrow(tensor, args[0], k).contiguous() for k in members)
            return Start("reduce_scatter", group, parts, args[1], label=label)
    assert name == "all_to_all", name
    source, target = args
    parts = tuple(narrow(tensor, target, k).contiguous() for k in members)
    mine = parts[index].shape
    shapes = tuple(_part_shape(mine, source, k) for k in members)
    return Start("all_to_all", group, parts, shapes=shapes, label=label)


def unpack(op: Op, tensors: Sequence[Tensor]) -> Tensor:
    """The result of collective `op` from what `Wait` answered."""
    args: tuple[Any, ...] = op.args[2:]
    if op.name in ("comm.all_gather", "comm.all_to_all"):
        return _join(tensors, args[0])
    return tensors[0]


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
