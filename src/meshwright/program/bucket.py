"""Buckets: collectives of one kind that travel together, since each call costs beside its bytes.

Li et al. 2020 (PyTorch DDP, section 3.2.3) found 25 MiB a good size. A program keeps one op per
tensor, with its own reason and source line; only its instructions know buckets.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

from meshwright.program.program import ITEMSIZE, Op, Program

__all__ = ["BUCKET_BYTES", "buckets", "kind_of", "load_of"]

BUCKET_BYTES = 25 * 2**20


def load_of(op: Op, program: Program) -> int:
    """Bytes of a collective's operand or of its result, whichever is more.

    Where shards are uneven, those of an even one (`load`, in elements): buckets are alike on all
    ranks.
    """
    given, made = program.values[op.inputs[0]], program.values[op.results[0]]
    load = dict(op.kwargs).get("load")
    if isinstance(load, int):
        return load * ITEMSIZE[given.dtype]
    return max(given.bytes, made.bytes)


def kind_of(op: Op, program: Program) -> Hashable:
    """What collectives of one bucket have in common.

    The phase is part of it: a weight that forward and backward gather would be there twice.
    """
    reduction = op.args[-1] if op.name in ("comm.all_reduce", "comm.reduce_scatter") else None
    return op.name, op.args[1], reduction, program.values[op.inputs[0]].dtype, op.phase


@dataclass(slots=True)
class _Open:
    """A bucket that is being filled."""

    ops: list[Op] = field(default_factory=list)
    bytes: int = 0


def buckets(
    program: Program,
    ops: Iterable[Op],
    limit: int = BUCKET_BYTES,
    fits: Callable[[list[Op], Op], bool] = lambda _ops, _op: True,
) -> list[tuple[Op, ...]]:
    """Deal collectives out to buckets, in order, an open one per kind.

    Args:
        program: theirs.
        ops: in the order in which they can start.
        limit: bytes of a bucket; a collective that is larger has one for itself.
        fits: whether an op may join those of a bucket, beside its size.
    """
    made: list[_Open] = []
    filling: dict[Hashable, _Open] = {}
    for op in ops:
        kind, load = kind_of(op, program), load_of(op, program)
        bucket = filling.get(kind)
        if bucket is None or bucket.bytes + load > limit or not fits(bucket.ops, op):
            bucket = filling[kind] = _Open()
            made.append(bucket)
        bucket.ops.append(op)
        bucket.bytes += load
    return [tuple(bucket.ops) for bucket in made]
