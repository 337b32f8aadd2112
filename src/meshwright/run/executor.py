"""The executor: one interpreter of instructions, a generator that lives as long as the plan.

It yields Comm requests, which are values; at each step's end it yields `Committed` and is sent the
next step's work. What Finish, Agree, Update and Commit mean is the business of the `Step` it is
given; everything else is here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from meshwright.comm.base import Group, Handle, Wait
from meshwright.compile.collective import start, unpack
from meshwright.program.instruction import Instruction, InstructionList

__all__ = ["Committed", "Place", "Step", "Timing", "execute"]

Environment = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank is: its coordinates, and its groups along the axes."""

    coordinates: Mapping[str, int]
    groups: Mapping[str, Group]


@dataclass(slots=True)
class Timing:
    """Seconds of a step: loading data, computing, waiting for collectives, updating weights."""

    data: float = 0.0
    compute: float = 0.0
    communication: float = 0.0
    update: float = 0.0


@dataclass(frozen=True, slots=True)
class Committed:
    """Yielded when a step is done (`result` None: ready for the first one)."""

    result: Any = None
    timing: Timing = field(default_factory=Timing)


class Step(Protocol):
    """One step's work, as the executor meets it."""

    def load(self, microbatch: int) -> Mapping[str, Tensor]:
        """The operands of a micro-batch, by name without its number."""

    def finish(self, values: Environment) -> None:
        """Gradients are reduced: take the step's sums together."""

    def agree(self) -> Generator[Any, Any, None]:
        """Reduce the sums and flags over the ranks; an exchange."""

    def update(self, values: Environment) -> None:
        """Step the optimizer."""

    def commit(self, values: Environment) -> Any:
        """Make what was held aside the state; the step's result."""


def execute(
    program: InstructionList,
    functions: Sequence[Callable[..., Sequence[Tensor]]],
    values: Environment,
    place: Place,
) -> Generator[Any, Any, None]:
    """Interpret `program`: one step per `Step` sent in, until None is sent.

    Args:
        program: the rank's.
        functions: its segments, lowered.
        values: the rank's state by name; steps read and change it.
        place: the rank's.
    """
    pending: dict[str, Handle] = {}
    step: Step | None = yield Committed()
    while step is not None:
        timing, result = Timing(), None
        for instruction in program.body:
            before = time.perf_counter()
            match instruction.kind:
                case "Load":
                    _load(instruction, step, values)
                    timing.data += time.perf_counter() - before
                case "Run":
                    _run(instruction, functions, values)
                    timing.compute += time.perf_counter() - before
                case "Start":
                    call = program.calls[instruction.segment or 0]
                    axis = instruction.axis or ""
                    tensor = values[instruction.inputs[0]]
                    group, index = place.groups[axis], place.coordinates[axis]
                    pending[instruction.outputs[0]] = yield start(call, tensor, group, index)
                    timing.communication += time.perf_counter() - before
                case "Wait":
                    handle = pending.pop(instruction.inputs[0])
                    tensors = yield Wait(handle)
                    call = program.calls[instruction.segment or 0]
                    values[instruction.outputs[0]] = unpack(call, tensors)
                    timing.communication += time.perf_counter() - before
                case "Free":
                    for name in instruction.inputs:
                        values.pop(name, None)
                case "Stash":
                    kept = [values[name] for name in instruction.inputs]
                    values.update(zip(instruction.outputs, kept, strict=True))
                case "Finish":
                    step.finish(values)
                    timing.update += time.perf_counter() - before
                case "Agree":
                    yield from step.agree()
                    timing.communication += time.perf_counter() - before
                case "Update":
                    step.update(values)
                    timing.update += time.perf_counter() - before
                case "Commit":
                    result = step.commit(values)
                    timing.update += time.perf_counter() - before
                case _:
                    raise AssertionError(instruction)
        step = yield Committed(result, timing)


def _load(instruction: Instruction, step: Step, values: Environment) -> None:
    assert instruction.microbatch is not None
    operands = step.load(instruction.microbatch)
    for name in instruction.outputs:
        values[name] = operands[name.partition(":")[2]]


def _run(
    instruction: Instruction,
    functions: Sequence[Callable[..., Sequence[Tensor]]],
    values: Environment,
) -> None:
    assert instruction.segment is not None
    results = functions[instruction.segment](*[values[name] for name in instruction.inputs])
    values.update(zip(instruction.outputs, results, strict=True))
