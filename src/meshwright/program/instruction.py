"""Instructions: what a rank does, in order; one list that is executed, simulated, checked, drawn.

A list has a prologue, a body (one step, repeated) and a drain. Values are named: state by its
global name (`model/...`, `gradient/...`), a micro-batch's values `k:number`. Collectives exist only
as Start and Wait, messages as Send, Recv and Wait; a started one's pending result is `~value`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from meshwright.program.program import Op, Program, Value

__all__ = ["Instruction", "InstructionList", "Kind", "Message"]

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
        axis: of a Start or Wait; the tier of a Load, Wait or Stash of what is offloaded.
        peer: of a Send, Recv or the Wait for one, the rank at the other end; its segment is an
            index into the list's `messages`.
        draws: of a Run with random ops, which of its inputs is the position, and how many random
            ops of the forward come before its own, which it counts from zero: so equal layers are
            one segment.
    """

    kind: Kind
    segment: int | None = None
    microbatch: int | None = None
    version: int = 0
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    axis: str | None = None
    draws: tuple[int, int] | None = None
    peer: int | None = None

    @property
    def offloads(self) -> bool:
        """Whether it moves a value from or to another tier than the device's memory."""
        return self.axis in ("host", "disk")

    def __str__(self) -> str:
        """`Run 3 @0: a, b -> c`."""
        where = "" if self.microbatch is None else f" @{self.microbatch}"
        number = "" if self.segment is None else f" {self.segment}"
        axis = f" over {self.axis}" if self.axis else ""
        axis += "" if self.peer is None else f" with rank {self.peer}"
        reads, makes = ", ".join(self.inputs), ", ".join(self.outputs)
        return f"{self.kind}{number}{where}{axis}: {reads} -> {makes}"


@dataclass(frozen=True, slots=True)
class Message:
    """What goes from one rank to another: `label` says what it is, alike on both."""

    label: str
    values: tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class InstructionList:
    """What a rank does under a plan: the lists, the segments they run, the collectives they start.

    A segment is a Program without collectives, numbered from zero, so that equal ones are one; a
    call is a bucket: ops of a partitioned program, of one kind, their operands taken out. A message
    is what a Send or Recv carries: the names of its values and what they are.
    """

    prologue: tuple[Instruction, ...]
    body: tuple[Instruction, ...]
    drain: tuple[Instruction, ...]
    segments: tuple[Program, ...]
    calls: tuple[tuple[Op, ...], ...]
    messages: tuple[Message, ...] = ()
