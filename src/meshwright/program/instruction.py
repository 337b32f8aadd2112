"""Instructions: what a rank does, in order; one list that is executed, simulated, checked, drawn.

A list has a prologue, a body (one step, repeated) and a drain. Values are named: state by its
global name (`model/...`, `gradient/...`), a micro-batch's values `k:number`. Collectives exist only
as Start and Wait; a started one's pending result is named `~value`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from meshwright.program.partition import COLLECTIVES
from meshwright.program.program import Op, Program, map_refs

__all__ = ["Instruction", "InstructionList", "Kind", "Piece", "pieces", "run_pieces", "segments_of"]

Kind = Literal[
    "Load",
    "Run",
    "Start",
    "Wait",
    "Send",
    "Recv",
    "Free",
    "Stash",
    "Finish",
    "Agree",
    "Update",
    "Commit",
]


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction.

    Attributes:
        segment: what a Run calls, or which collective a Start begins and a Wait ends; an index
            into the list's `segments` or `calls`.
        microbatch: which micro-batch it serves; None for what is done once a step.
        version: of the weights it reads (0 is the newest).
        inputs, outputs: names of values; a Free's inputs are what it frees.
        axis: of a Start or Wait.
    """

    kind: Kind
    segment: int | None = None
    microbatch: int | None = None
    version: int = 0
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    axis: str | None = None

    def __str__(self) -> str:
        """`Run 3 @0: a, b -> c`."""
        where = "" if self.microbatch is None else f" @{self.microbatch}"
        number = "" if self.segment is None else f" {self.segment}"
        axis = f" over {self.axis}" if self.axis else ""
        reads, makes = ", ".join(self.inputs), ", ".join(self.outputs)
        return f"{self.kind}{number}{where}{axis}: {reads} -> {makes}"


@dataclass(frozen=True, slots=True)
class InstructionList:
    """What a rank does under a plan: the lists, the segments they run, the collectives they start.

    A segment is a Program without collectives, numbered from zero, so that equal ones are one; a
    call is a collective's op of a partitioned program, its operand taken out.
    """

    prologue: tuple[Instruction, ...]
    body: tuple[Instruction, ...]
    drain: tuple[Instruction, ...]
    segments: tuple[Program, ...]
    calls: tuple[Op, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a program between collectives: ops to run, or one collective begun or awaited."""

    kind: Literal["run", "start", "wait"]
    ops: tuple[Op, ...]


def pieces(program: Program) -> tuple[Piece, ...]:
    """Cut a partitioned program where collectives stand.

    A collective is started before the segment in which it stands when its operand is there already
    (so that it runs meanwhile), else right after what makes it; it is awaited before the first op
    that reads it.
    """
    found: list[Piece] = []
    segment: list[Op] = []
    made: set[int] = set()
    pending: dict[int, Op] = {}

    def close() -> None:
        if segment:
            found.append(Piece("run", tuple(segment)))
            segment.clear()
            made.clear()

    for op in program.ops:
        waits = [v for v in dict.fromkeys(op.inputs) if v in pending]
        if waits:
            close()
            found.extend(Piece("wait", (pending.pop(v),)) for v in waits)
        if op.name in COLLECTIVES:
            if op.inputs[0] in made:
                close()
            found.append(Piece("start", (op,)))
            pending[op.results[0]] = op
        else:
            segment.append(op)
            made.update(op.results)
    close()
    found.extend(Piece("wait", (op,)) for op in pending.values())
    return tuple(found)


class Table:
    """Segments and calls gathered over several programs; equal segments are kept once."""

    def __init__(self) -> None:
        """Empty."""
        self.segments: list[Program] = []
        self.calls: list[Op] = []
        self.known: dict[str, int] = {}

    def segment(self, program: Program) -> int:
        """The number of an equal segment, added if it is new."""
        if program.digest not in self.known:
            self.known[program.digest] = len(self.segments)
            self.segments.append(program)
        return self.known[program.digest]

    def call(self, op: Op) -> int:
        """The number of the collective."""
        self.calls.append(op)
        return len(self.calls) - 1


def segments_of(
    program: Program, ops: Sequence[Op], wanted: frozenset[int]
) -> tuple[Program, tuple[int, ...], tuple[int, ...]]:
    """(segment, values it reads, values it gives): `ops` numbered from zero, in order of use.

    `wanted` are the values that anybody reads after these ops.
    """
    number: dict[int, int] = {}
    made = {value for op in ops for value in op.results}
    reads = tuple(dict.fromkeys(v for op in ops for v in op.inputs if v not in made))
    gives = tuple(dict.fromkeys(v for op in ops for v in op.results if v in wanted))
    for value in reads:
        number[value] = len(number)
    for op in ops:
        for value in op.results:
            number[value] = len(number)
    renamed = tuple(
        replace(
            op,
            args=map_refs(op.args, number.__getitem__),
            kwargs=map_refs(op.kwargs, number.__getitem__),
            outputs=tuple(None if v is None else number[v] for v in op.outputs),
        )
        for op in ops
    )
    values = tuple(program.values[value] for value in number)
    inputs = tuple((f"i{k}", number[v]) for k, v in enumerate(reads))
    outputs = tuple((f"o{k}", number[v]) for k, v in enumerate(gives))
    return Program(values, inputs, renamed, outputs), reads, gives


def run_pieces(
    program: Program,
    table: Table,
    microbatch: int | None,
    names: Mapping[str, str],
    prefix: str = "",
) -> tuple[Instruction, ...]:
    """The instructions that run a partitioned program once.

    Args:
        program: a rank's.
        table: takes its segments and calls.
        microbatch: which one.
        names: program input or output name -> name of the value outside (state, a batch leaf).
        prefix: tells this program's own values from others'.
    """
    outside = {value: names.get(name, name) for name, value in program.inputs}
    here = f"{prefix}{'' if microbatch is None else microbatch}:"

    def name(value: int) -> str:
        return outside.get(value, f"{here}{value}")

    cut = pieces(program)
    delivered = frozenset(value for _, value in program.outputs)
    later: list[frozenset[int]] = []
    seen = set(delivered)
    for piece in reversed(cut):
        later.append(frozenset(seen))
        seen |= {value for op in piece.ops for value in op.inputs}
    later.reverse()

    found: list[Instruction] = []
    calls: dict[int, int] = {}
    for piece, wanted in zip(cut, later, strict=True):
        if piece.kind == "run":
            segment, reads, gives = segments_of(program, piece.ops, wanted)
            index = table.segment(segment)
            inputs, outputs = tuple(map(name, reads)), tuple(map(name, gives))
            found.append(Instruction("Run", index, microbatch, 0, inputs, outputs))
            continue
        op = piece.ops[0]
        axis = op.args[1]
        assert isinstance(axis, str)
        result = name(op.results[0])
        if piece.kind == "start":
            calls[op.results[0]] = table.call(op)
            begun = Instruction(
                "Start",
                calls[op.results[0]],
                microbatch,
                0,
                (name(op.inputs[0]),),
                (f"~{result}",),
                axis,
            )
            found.append(begun)
        else:
            number = calls[op.results[0]]
            found.append(
                Instruction("Wait", number, microbatch, 0, (f"~{result}",), (result,), axis)
            )
    return (*_with_frees(found, {name(v) for v in delivered}, set(outside.values())),)


def _with_frees(
    instructions: Sequence[Instruction], kept: set[str], outside: set[str]
) -> list[Instruction]:
    """Free each value after its last reader; what a Start reads lives until its Wait."""
    ends: dict[str, int] = {}
    operand: dict[str, tuple[str, ...]] = {}
    for place, instruction in enumerate(instructions):
        for value in (*instruction.inputs, *instruction.outputs):
            ends[value] = place
        if instruction.kind == "Start":
            operand[instruction.outputs[0]] = instruction.inputs
        if instruction.kind == "Wait":
            for value in operand[instruction.inputs[0]]:
                ends[value] = place
    found: list[Instruction] = []
    for place, instruction in enumerate(instructions):
        found.append(instruction)
        dead = [v for v, end in ends.items() if end == place and v not in kept and v not in outside]
        dead = [v for v in dead if not v.startswith("~")]
        if dead:
            found.append(Instruction("Free", None, instruction.microbatch, 0, tuple(dead)))
    return found
