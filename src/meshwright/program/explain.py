"""Explain: every collective of a step, what it moves, and the source line and layouts it serves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from meshwright.plan.mesh import Axis
from meshwright.program.assemble import Compiled
from meshwright.program.partition import COLLECTIVES
from meshwright.program.program import ITEMSIZE, Op, Program

__all__ = ["Row", "collectives"]


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
    value: str
    source: str
    module: str
    phase: str
    why: str

    def as_json(self) -> dict[str, Any]:
        """As a mapping."""
        return asdict(self)


def collectives(compiled: Compiled, axes: Sequence[Axis]) -> tuple[Row, ...]:
    """All collectives of a step, those alike in all but number merged, largest first."""
    merged: dict[tuple[str, ...], Row] = {}
    for row in _rows(compiled, {axis.name: axis.size for axis in axes}):
        key = (row.op, row.axis, row.value, row.source, row.module, row.phase, row.why)
        old = merged.get(key)
        if old is None:
            merged[key] = row
        else:
            merged[key] = replace(
                old,
                elements=old.elements + row.elements,
                bytes=old.bytes + row.bytes,
                count=old.count + row.count,
            )
    return tuple(sorted(merged.values(), key=lambda row: -row.bytes))


def _rows(compiled: Compiled, sizes: dict[str, int]) -> Iterator[Row]:
    programs = [(count, local.program, "") for count, local in compiled.units]
    programs += [(1, move.program, "finish") for move in compiled.moves]
    for count, program, phase in programs:
        for op in program.ops:
            if op.name in COLLECTIVES:
                yield _row(op, program, count, phase, sizes)


def _row(op: Op, program: Program, count: int, phase: str, sizes: dict[str, int]) -> Row:
    axis = op.args[1]
    assert isinstance(axis, str)
    notes = dict(op.kwargs)
    elements = moved(op, program, sizes[axis]) * count
    return Row(
        op=op.name.removeprefix("comm."),
        axis=axis,
        elements=elements,
        bytes=elements * ITEMSIZE[program.values[op.results[0]].dtype],
        count=count,
        value=str(notes["value"]),
        source=op.source,
        module=op.module,
        phase=phase or op.phase,
        why=f"{notes['before']} -> {notes['after']}",
    )


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
    return (size - 1) * given // size
