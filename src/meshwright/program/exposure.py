"""Exposure: what a rank computes between the Start and the Wait of each collective.

A collective is *exposed* where nothing is computed between the two: no Run stands there, or only
Runs of views. Then the rank can do nothing but wait. Otherwise it is *overlapped* by those Runs;
whether they last long enough is for a trace to say.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from meshwright.program.donate import bases
from meshwright.program.instruction import InstructionList
from meshwright.program.program import Op, Program

__all__ = ["Call", "calls"]


@dataclass(frozen=True, slots=True)
class Call:
    """One Start of a step, with its Wait.

    Attributes:
        ops: of the bucket that it begins.
        microbatch: which one; None for what is done once a step.
        beside: ops that are computed before its Wait, views not counted; none: it is exposed.
    """

    ops: tuple[Op, ...]
    microbatch: int | None
    beside: int


def calls(instructions: InstructionList) -> Iterator[Call]:
    """The collectives of a step, in the order of their Waits."""
    work = tuple(map(_computes, instructions.segments))
    done = 0  # ops computed so far
    begun: dict[str, int] = {}
    for instruction in instructions.body:
        if instruction.kind == "Run":
            assert instruction.segment is not None
            done += work[instruction.segment]
        elif instruction.kind == "Start":
            begun[instruction.outputs[0]] = done
        elif instruction.kind == "Wait" and instruction.peer is None and not instruction.offloads:
            assert instruction.segment is not None
            beside = done - begun.pop(instruction.inputs[0])
            yield Call(instructions.calls[instruction.segment], instruction.microbatch, beside)


def _computes(segment: Program) -> int:
    """Ops that make storage of their own."""
    base = bases(segment)
    return sum(any(base[value] == value for value in op.results) for op in segment.ops)
