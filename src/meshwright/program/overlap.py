"""Overlap: the order in which a rank's ops are done, so that collectives run beside compute.

A reduction starts as soon as what its bucket carries is made, and its first reader waits for it. A
gather of stored weights starts while the compute before its readers runs: one bucket ahead of need,
as far as a cap on gathered bytes allows. A small sum over the batch alone (tokens that count) goes
first, so that no rank waits for another amid a step. Everything else stays where it stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from meshwright.program.bucket import BUCKET_BYTES, buckets, load_of
from meshwright.program.partition import COLLECTIVES
from meshwright.program.program import Op, Program

__all__ = ["AHEAD_BYTES", "overlapped"]

AHEAD_BYTES = 2 * BUCKET_BYTES
"""Gathered bytes that may be there at once because of gathering ahead."""

_FEW, _SMALL = 16, 2**16
"""Ops that make a sum over the batch, and its bytes, up to which it goes first."""

_MOVABLE = COLLECTIVES - {"comm.permute"}
"""A ring's hops stay: early ones would hold the blocks of several ranks at once."""

_Place = tuple[int, int]
"""(number of an op, -2: before it, -1: right before it, 0: itself, 1: right after it)."""


def overlapped(program: Program, limit: int = BUCKET_BYTES, ahead: int = AHEAD_BYTES) -> Program:
    """The same ops in an order that starts collectives early, those of a bucket side by side.

    Args:
        program: a rank's.
        limit: bytes of a bucket.
        ahead: bytes of two successive buckets of gathers, above which the later one is not moved.
    """
    numbers = [place for place, op in enumerate(program.ops) if op.name in _MOVABLE]
    made = program.producers()
    sources = {number: _sources(program, made, number) for number in numbers}
    stored = {number: found for number, found in sources.items() if found is not None}
    moved = _ahead(program, stored, limit, ahead)
    moved |= _of_batch(program, made, [n for n in numbers if n not in stored])
    moved |= _at_once(program, made, [n for n in numbers if n not in moved], limit)
    order = sorted(range(len(program.ops)), key=lambda n: (*moved.get(n, (n, 0)), n))
    return replace(program, ops=tuple(program.ops[number] for number in order))


def _sources(program: Program, made: Mapping[int, int], number: int) -> tuple[int, ...] | None:
    """The casts and views between an input and what is gathered of it; None if it is computed."""
    found: list[int] = []
    op = program.ops[number]
    if op.name != "comm.all_gather":
        return None
    while (producer := made.get(op.inputs[0])) is not None:
        op = program.ops[producer]
        if op.name in COLLECTIVES or len(op.inputs) != 1:
            return None
        found.append(producer)
    return tuple(found)


def _of_batch(
    program: Program, made: Mapping[int, int], numbers: Sequence[int]
) -> dict[int, _Place]:
    """Small sums over what comes with the batch: they and what makes them go first."""
    batch = frozenset(value for name, value in program.inputs if name.startswith("batch/"))
    moved: dict[int, _Place] = {}
    for number in numbers:
        before = _made_of(batch, program, made, number)
        if before is not None and load_of(program.ops[number], program) <= _SMALL:
            moved |= dict.fromkeys(before, (-1, -2)) | {number: (-1, -1)}
    return moved


def _made_of(
    batch: frozenset[int], program: Program, made: Mapping[int, int], number: int
) -> set[int] | None:
    """The few ops that make an operand; None if they are many, or read more than the batch.

    What is made of nothing stays where it stands.
    """
    found: set[int] = set()
    touched = False
    values = list(program.ops[number].inputs)
    while values:
        value = values.pop()
        if value in batch:
            touched = True
            continue
        producer = made.get(value)
        if producer is None or program.ops[producer].name in COLLECTIVES or len(found) == _FEW:
            return None
        found.add(producer)
        values += program.ops[producer].inputs
    return found if touched else None


def _ahead(
    program: Program, stored: Mapping[int, tuple[int, ...]], limit: int, ahead: int
) -> dict[int, _Place]:
    """Gathers of state: each bucket moves to where the one before it is first read."""
    numbers = {id(program.ops[number]): number for number in stored}
    readers = program.readers()
    moved: dict[int, _Place] = {}
    filled = buckets(program, [program.ops[number] for number in stored], limit)
    last: tuple[int, int] | None = None  # (first reader, bytes) of the bucket before
    for bucket in filled:
        mine = [numbers[id(op)] for op in bucket]
        load = sum(load_of(op, program) for op in bucket)
        here = min(mine)
        if last is not None and last[1] + load <= ahead:
            here = min(here, last[0])
        for number in mine:
            moved[number] = (here, -1)
            for source in stored[number]:  # which an earlier bucket may read too
                moved[source] = min((here, -2), moved.get(source, (source, 0)))
        last = min(_first_reader(program, readers, op) for op in bucket), load
    return moved


def _at_once(
    program: Program, made: Mapping[int, int], numbers: Sequence[int], limit: int
) -> dict[int, _Place]:
    """Collectives of what is computed: each bucket moves to where the last of it is made."""
    readers = program.readers()

    def ready(op: Op) -> int:
        return max(made.get(value, -1) for value in op.inputs)

    def fits(bucket: list[Op], op: Op) -> bool:
        return ready(op) < min(_first_reader(program, readers, other) for other in bucket)

    ops = [program.ops[number] for number in numbers]
    places = {id(op): number for op, number in zip(ops, numbers, strict=True)}
    free = [op for op in ops if not any(_collective(program, made, v) for v in op.inputs)]
    filled = buckets(program, sorted(free, key=ready), limit, fits)
    return {places[id(op)]: (max(map(ready, bucket)), 1) for bucket in filled for op in bucket}


def _collective(program: Program, made: Mapping[int, int], value: int) -> bool:
    """Whether a collective makes the value."""
    return value in made and program.ops[made[value]].name in COLLECTIVES


def _first_reader(program: Program, readers: Mapping[int, Sequence[int]], op: Op) -> int:
    """The number of the first op that reads a collective's result; the end if none does."""
    return min(readers.get(op.results[0], ()), default=len(program.ops))
