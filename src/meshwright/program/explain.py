"""Explain: every collective of a step, what it moves, and the source line and layouts it serves.

Read off the instruction list that is executed, bucket by bucket.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from meshwright.plan.mesh import Axis
from meshwright.program.assemble import Compiled
from meshwright.program.exposure import Call, calls
from meshwright.program.partition import COLLECTIVES
from meshwright.program.program import ITEMSIZE, Op, Program

__all__ = ["Row", "Sent", "collectives", "merged", "moved", "sent"]


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of collective of one rank's step.

    Attributes:
        op: its name.
        axis: over which it goes.
        elements: that a rank sends per step (and receives), by the best algorithm: (N-1)/N of the
            whole for a gather or a scatter, twice that for an all-reduce.
        bytes: the same in bytes.
        count: calls per step.
        exposed: of these calls, those beside which nothing is computed.
        exposed_bytes: what those move.
        beside: ops computed beside the other call that has the fewest; 0 where all are exposed.
        value: the state that it serves, where it does (`model/...`, `gradient/...`).
        source: the user's line that it serves.
        module: path of the module.
        phase: forward, backward or finish.
        why: the two layouts that differ.
    """

    op: str
    axis: str
    elements: int
    bytes: int
    count: int
    exposed: int
    exposed_bytes: int
    beside: int
    value: str
    source: str
    module: str
    phase: str
    why: str

    def as_json(self) -> dict[str, Any]:
        """As a mapping."""
        return asdict(self)

    def plus(self, other: Row) -> Row:
        """The two of them together."""
        beside = [row.beside for row in (self, other) if row.beside]
        return replace(
            self,
            elements=self.elements + other.elements,
            bytes=self.bytes + other.bytes,
            count=self.count + other.count,
            exposed=self.exposed + other.exposed,
            exposed_bytes=self.exposed_bytes + other.exposed_bytes,
            beside=min(beside, default=0),
        )


@dataclass(frozen=True, slots=True)
class Sent:
    """One call of a step: its op, the rank's program that holds the op, and its row."""

    op: Op
    program: Program
    row: Row


def collectives(compiled: Compiled, axes: Sequence[Axis]) -> tuple[Row, ...]:
    """All collectives of a step, those alike in all but number merged, largest first."""
    return merged(found.row for found in sent(compiled, axes))


def merged(rows: Iterable[Row]) -> tuple[Row, ...]:
    """The rows, those alike in all but number as one, largest first."""
    known: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = (row.op, row.axis, row.value, row.source, row.module, row.phase, row.why)
        known[key] = known[key].plus(row) if key in known else row
    return tuple(sorted(known.values(), key=lambda row: -row.bytes))


def sent(compiled: Compiled, axes: Sequence[Axis]) -> Iterator[Sent]:
    """Every call of a step, in the order of the instruction list."""
    sizes = {axis.name: axis.size for axis in axes}
    programs = [local.program for _, local in compiled.units]
    programs += [move.program for move in compiled.moves]
    homes = {id(op): p for p in programs for op in p.ops if op.name in COLLECTIVES}
    makers = {id(p): p.producers() for p in programs}
    for call in calls(compiled.instructions):
        for op in call.ops:
            program = homes[id(op)]
            origin = _origin(op, program, makers[id(program)])
            yield Sent(op, program, _row(op, program, sizes, call, origin))


def _origin(op: Op, program: Program, makers: dict[int, int]) -> Op:
    """The op that a collective serves: its reader, or what made its operand where nobody reads."""
    waiting = [op]
    while waiting:
        found = waiting.pop(0)
        if found.source:
            return found
        waiting += [program.ops[makers[value]] for value in found.inputs if value in makers]
    return op


def _row(op: Op, program: Program, sizes: dict[str, int], call: Call, origin: Op) -> Row:
    axis = op.args[1]
    assert isinstance(axis, str)
    notes = dict(op.kwargs)
    value = str(notes["value"])
    elements = moved(op, program, sizes[axis])
    size = elements * ITEMSIZE[program.values[op.results[0]].dtype]
    return Row(
        op=op.name.removeprefix("comm."),
        axis=axis,
        elements=elements,
        bytes=size,
        count=1,
        exposed=int(not call.beside),
        exposed_bytes=0 if call.beside else size,
        beside=call.beside,
        value=value,
        source=op.source or origin.source,
        module=op.module or origin.module or _module(value),
        phase=op.phase,
        why=f"{notes['before']} -> {notes['after']}",
    )


def _module(value: str) -> str:
    """The module of `model/blocks.0.up.weight`; empty for what is no parameter's."""
    kind, _, name = value.partition("/")
    return name.rpartition(".")[0] if kind in ("model", "gradient") else ""


def moved(op: Op, program: Program, size: int) -> int:
    """Elements that a rank sends for one call, by the best algorithm."""
    given = program.values[op.inputs[0]].elements
    made = program.values[op.results[0]].elements
    match op.name:
        case "comm.all_gather":
            return made - given
        case "comm.reduce_scatter":
            return given - made
        case "comm.all_reduce":
            return 2 * (size - 1) * given // size
        case "comm.all_to_all":
            return _exchanged(op, program)
        case "comm.permute":
            return given
    return (size - 1) * given // size


def _exchanged(op: Op, program: Program) -> int:
    """Elements of an all-to-all's operand that go to other ranks; parts need not be even."""
    said, cut = dict(op.kwargs).get("sent"), op.args[2]
    if isinstance(said, int):
        return said
    assert isinstance(cut, tuple)
    dim = cut[0]
    assert isinstance(dim, int)
    given, made = program.values[op.inputs[0]], program.values[op.results[0]]
    kept = made.elements * given.shape[dim] // made.shape[dim] if made.elements else 0
    return given.elements - kept
