"""Pieces: a partitioned program cut into segments and buckets, and what runs them."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from meshwright.program.bucket import BUCKET_BYTES, buckets
from meshwright.program.instruction import Instruction
from meshwright.program.partition import COLLECTIVES
from meshwright.program.program import Op, Program, map_refs
from meshwright.program.repeat import repeated

__all__ = ["Piece", "Table", "pieces", "run_pieces", "segments_of", "with_frees"]


_FINE = 16
"""Pieces of a phase of a program that is cut finely."""

_UNDER_WAY = 2
"""Buckets under way whose results nobody reads here: gradients, whole until they are awaited."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of a program between collectives: ops to run, or a bucket begun or awaited."""

    kind: Literal["run", "start", "wait"]
    ops: tuple[Op, ...]


class _Cutter:
    """Cuts ops into pieces, one op after the other."""

    def __init__(self, program: Program, limit: int) -> None:
        self.program, self.limit = program, limit
        self.found: list[Piece] = []
        self.segment: list[Op] = []
        self.beside: list[Op] = []  # collectives that stand side by side
        self.pending: dict[int, tuple[Op, ...]] = {}
        self.read = frozenset(value for op in program.ops for value in op.inputs)
        self.unread: deque[tuple[Op, ...]] = deque()

    def collective(self, op: Op) -> None:
        """A collective joins those right before it, unless it reads their results."""
        self.close()
        if any(other.results[0] in op.inputs for other in self.beside):
            self.begin()
        self.wait(op)
        self.beside.append(op)

    def compute(self, op: Op, *, border: bool) -> None:
        """Any other op joins the segment, if there is nothing to wait for."""
        self.begin()
        if border:
            self.close()
        self.wait(op)
        self.segment.append(op)

    def close(self) -> None:
        """End the segment."""
        if self.segment:
            self.found.append(Piece("run", tuple(self.segment)))
            self.segment.clear()

    def begin(self) -> None:
        """Start the buckets of the collectives that stand side by side."""
        for bucket in buckets(self.program, self.beside, self.limit):
            self.found.append(Piece("start", bucket))
            if any(op.results[0] in self.read for op in bucket):
                self.pending.update((op.results[0], bucket) for op in bucket)
                continue
            self.unread.append(bucket)
            if len(self.unread) > _UNDER_WAY:
                self.found.append(Piece("wait", self.unread.popleft()))
        self.beside.clear()

    def wait(self, op: Op) -> None:
        """Wait for the buckets whose results an op reads."""
        for value in op.inputs:
            bucket = self.pending.get(value, ())
            if bucket:
                self.close()
                self.found.append(Piece("wait", bucket))
            for member in bucket:
                del self.pending[member.results[0]]

    def end(self) -> tuple[Piece, ...]:
        """Close what is open, and wait for what nobody reads here."""
        self.begin()
        self.close()
        left = dict.fromkeys((*self.unread, *self.pending.values()))
        return (*self.found, *(Piece("wait", bucket) for bucket in left))


def pieces(program: Program, limit: int = BUCKET_BYTES, *, fine: bool = False) -> tuple[Piece, ...]:
    """Cut a partitioned program where collectives stand, and where repeated modules begin and end.

    With `fine`, what is long between repeated modules is cut as well, so that values go from piece
    to piece.

    Collectives that stand side by side are dealt out to buckets of `limit` bytes. A bucket is
    started where it stands, and awaited before the first op that reads any of its results; one
    whose results none reads, when `_UNDER_WAY` more have begun, so that its operands can go.
    """
    cutter, borders = _Cutter(program, limit), repeated(program)
    if fine:
        borders = _finer(program, borders)
    for number, op in enumerate(program.ops):
        if op.name in COLLECTIVES:
            cutter.collective(op)
        else:
            cutter.compute(op, border=number in borders)
    return cutter.end()


def _finer(program: Program, borders: frozenset[int]) -> frozenset[int]:
    """The borders, and more where a phase's ops between two of them are many."""
    found = set(borders)
    for phase in ("forward", "backward"):
        places = [number for number, op in enumerate(program.ops) if op.phase == phase]
        most, since = max(1, len(places) // _FINE), 0
        for number in places:
            since = 0 if number in borders else since + 1
            if since == most:
                found.add(number)
                since = 0
    return frozenset(found)


class Table:
    """Segments and calls gathered over several programs; equal segments are kept once."""

    def __init__(self, *, fine: bool = False) -> None:
        """Empty; `fine` as of `pieces`."""
        self.fine = fine
        self.segments: list[Program] = []
        self.calls: list[tuple[Op, ...]] = []
        self.known: dict[str, int] = {}

    def segment(self, program: Program) -> int:
        """The number of an equal segment, added if it is new."""
        if program.digest not in self.known:
            self.known[program.digest] = len(self.segments)
            self.segments.append(program)
        return self.known[program.digest]

    def call(self, bucket: tuple[Op, ...]) -> int:
        """The number of the bucket."""
        self.calls.append(bucket)
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


def _draws_from_zero(ops: tuple[Op, ...]) -> tuple[tuple[Op, ...], tuple[int, int] | None]:
    """Ops whose random ones are numbered from zero; (the position's value, how many come before).

    None where nothing is drawn.
    """
    drawn = [op for op in ops if op.base == "meshwright.draw"]
    if not drawn:
        return ops, None
    numbers = [n for op in drawn if isinstance(n := op.args[2], int)]
    before = min(numbers)

    def counted(op: Op) -> Op:
        if op.base != "meshwright.draw":
            return op
        n = op.args[2]
        assert isinstance(n, int)
        return replace(op, args=(*op.args[:2], n - before, *op.args[3:]))

    return tuple(map(counted, ops)), (drawn[0].inputs[0], before)


def run_pieces(
    program: Program,
    table: Table,
    microbatch: int | None,
    names: Mapping[str, str],
    prefix: str = "",
    limit: int = BUCKET_BYTES,
) -> tuple[Instruction, ...]:
    """The instructions that run a partitioned program once.

    Args:
        program: a rank's.
        table: takes its segments and calls.
        microbatch: which one.
        names: program input or output name -> name of the value outside (state, a batch leaf).
        prefix: tells this program's own values from others'.
        limit: bytes of a bucket.
    """
    outside = {value: names.get(name, name) for name, value in program.inputs}
    here = f"{prefix}{'' if microbatch is None else microbatch}:"

    def name(value: int) -> str:
        return outside.get(value, f"{here}{value}")

    cut = pieces(program, limit, fine=table.fine)
    delivered = frozenset(value for _, value in program.outputs)
    later: list[frozenset[int]] = []
    seen = set(delivered)
    for piece in reversed(cut):
        later.append(frozenset(seen))
        seen |= {value for op in piece.ops for value in op.inputs}
    later.reverse()

    found: list[Instruction] = []
    calls: dict[tuple[Op, ...], int] = {}
    for piece, wanted in zip(cut, later, strict=True):
        if piece.kind == "run":
            ops, draws = _draws_from_zero(piece.ops)
            segment, reads, gives = segments_of(program, ops, wanted)
            index = table.segment(segment)
            inputs, outputs = tuple(map(name, reads)), tuple(map(name, gives))
            where = None if draws is None else (reads.index(draws[0]), draws[1])
            run = Instruction("Run", index, microbatch, 0, inputs, outputs, draws=where)
            found.append(run)
            continue
        axis = piece.ops[0].args[1]
        assert isinstance(axis, str)
        results = tuple(name(op.results[0]) for op in piece.ops)
        pending = (f"~{results[0]}",)
        if piece.kind == "start":
            calls[piece.ops] = table.call(piece.ops)
            first = [op.inputs[0] for op in piece.ops]
            more = [value for op in piece.ops for value in op.inputs[1:]]
            operands = tuple(map(name, (*first, *more)))
            begun = Instruction("Start", calls[piece.ops], microbatch, 0, operands, pending, axis)
            found.append(begun)
        else:
            number = calls[piece.ops]
            found.append(Instruction("Wait", number, microbatch, 0, pending, results, axis))
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


def with_frees(instructions: Sequence[Instruction]) -> list[Instruction]:
    """A whole list in which values of micro-batches (`...k:name`) go after their last reader.

    What a Send reads lives until its Wait, and what is freed already is left alone.
    """
    freed = {v for each in instructions if each.kind == "Free" for v in each.inputs}
    ends: dict[str, int] = {}
    carried: dict[str, tuple[str, ...]] = {}
    for place, each in enumerate(instructions):
        used = [*each.inputs, *each.outputs]
        if each.kind == "Send":
            carried[each.outputs[0]] = each.inputs
        elif each.kind == "Wait" and each.inputs[0] in carried:
            used += carried.pop(each.inputs[0])
        ends.update((v, place) for v in used if ":" in v and v[0] != "~" and v not in freed)
    dead: dict[int, list[str]] = {}
    for value, place in ends.items():
        dead.setdefault(place, []).append(value)
    found: list[Instruction] = []
    for place, each in enumerate(instructions):
        found.append(each)
        if place in dead:
            found.append(Instruction("Free", None, each.microbatch, 0, tuple(dead[place])))
    return found
