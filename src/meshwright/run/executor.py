"""The executor: one interpreter of instructions, a generator that lives as long as the plan.

It yields Comm requests, which are values; at each step's end it yields `Committed` and is sent the
next step's work. What Finish, Agree, Update and Commit mean is the business of the `Step` it is
given; everything else is here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from meshwright.comm.base import Group, Handle, Start, Wait
from meshwright.compile.collective import Wire, start, unpack, wire
from meshwright.compile.draw import later
from meshwright.compile.settings import in_dtype
from meshwright.program.instruction import Instruction, InstructionList, Kind, Message
from meshwright.program.program import Op
from meshwright.run.checkpoint.header import dtype_of
from meshwright.run.meter import Meter

__all__ = [
    "Committed",
    "Machine",
    "Metered",
    "Place",
    "Sharing",
    "Step",
    "Store",
    "Timing",
    "execute",
    "follow",
    "interpret",
    "older",
]

Environment = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank is: its coordinates, its groups along the axes, and its number."""

    coordinates: Mapping[str, int]
    groups: Mapping[str, Group]
    rank: int = 0


@dataclass(slots=True)
class Timing:
    """Seconds of a step: loading data, computing, waiting for collectives, updating weights."""

    data: float = 0.0
    compute: float = 0.0
    communication: float = 0.0
    update: float = 0.0

    @classmethod
    def of(cls, body: Sequence[Instruction], stamps: Sequence[float]) -> Timing:
        """The sums over a step's instructions; `stamps` as of `Committed`."""
        timing = cls()
        for instruction, (began, ended) in zip(body, pairwise(stamps), strict=True):
            match instruction.kind:
                case "Load" if not instruction.offloads:
                    timing.data += ended - began
                case "Run":
                    timing.compute += ended - began
                case "Start" | "Wait" | "Agree" | "Send" | "Recv":
                    timing.communication += ended - began
                case _:
                    timing.update += ended - began
        return timing


@dataclass(frozen=True, slots=True)
class Committed:
    """Yielded when a step is done (`result` None: ready for the first one).

    Attributes:
        stamps: `time.perf_counter()` before each instruction of the body and after the last; in a
            step that is profiled this is all that is known of time, and in others it costs no more.
    """

    result: Any = None
    timing: Timing = field(default_factory=Timing)
    stamps: Sequence[float] = ()


class Step(Protocol):
    """One step's work, as the executor meets it."""

    def load(self, microbatch: int) -> Mapping[str, Tensor]:
        """The operands of a micro-batch, by name without its number."""

    def finish(self, values: Environment) -> None:
        """Gradients are reduced: take the step's sums together."""

    def agree(self) -> Generator[Any, Any, None]:
        """Reduce the sums and flags over the ranks; an exchange."""

    def update(self, values: Environment, /) -> Generator[Any, Any, None]:
        """Step the optimizer; an exchange."""

    def commit(self, values: Environment) -> Any:
        """Make what was held aside the state; the step's result."""


class Store(Protocol):
    """What rests outside the device's memory, by the names of values."""

    def load(self, name: str) -> Callable[[], Tensor]:
        """Begin to copy a value here; the function waits for it."""

    def stash(self, name: str, tensor: Tensor) -> Tensor:
        """Begin to copy a value there; what it is from now on."""

    def settle(self) -> None:
        """Wait until all that was stashed is there."""


@runtime_checkable
class Sharing(Protocol):
    """A step whose ranks agree in parts."""

    def share(self, axis: str, values: Environment) -> Generator[Any, Any, None]:
        """Reduce what the ranks along an axis have to; an exchange."""


@runtime_checkable
class Metered(Protocol):
    """A step in which somebody may count what is held."""

    meter: Meter | None


def older(name: str, age: int) -> str:
    """What a weight of some updates ago is called."""
    return f"older/{age}/{name}"


def execute(
    program: InstructionList,
    functions: Sequence[Callable[..., Sequence[Tensor]]],
    values: Environment,
    place: Place,
    dtype: torch.dtype | None = None,
    store: Store | None = None,
) -> Generator[Any, Any, None]:
    """Interpret `program`: one step per `Step` sent in, until None is sent.

    Args:
        program: the rank's.
        functions: its segments, lowered.
        values: the rank's state by name; steps read and change it.
        place: the rank's.
        dtype: of all floating tensors, where it is not the program's.
        store: of what the program loads from and stashes in other tiers.
    """
    machine = Machine(functions, values, place, dtype=dtype, store=store)
    machine.learn(program.calls, program.messages)
    step: Step | None = yield Committed()
    while step is not None:
        committed = yield from interpret(machine, program.body, step)
        step = yield committed


def interpret(
    machine: Machine, body: Sequence[Instruction], step: Step
) -> Generator[Any, Any, Committed]:
    """Follow instructions one after the other; an exchange."""
    result = None
    meter = step.meter if isinstance(step, Metered) else None
    if meter is not None:
        meter.begin(machine.values)
    stamps = [time.perf_counter()]
    for instruction in body:
        if instruction.kind in _ASKING:
            yield from _ASKING[instruction.kind](machine, instruction, step)
        elif instruction.kind == "Commit":
            result = step.commit(machine.values)
        else:
            _ACTING[instruction.kind](machine, instruction, step)
        if meter is not None:
            meter.take(instruction, machine.values)
        stamps.append(time.perf_counter())
    return Committed(result, Timing.of(body, stamps), stamps)


def follow(machine: Machine, body: Sequence[Instruction]) -> Generator[Any, Any, None]:
    """Follow instructions that need no step: a program of its own between others; an exchange."""
    for instruction in body:
        match instruction.kind:
            case "Run":
                _run(machine, instruction, None)
            case "Start":
                yield from _start(machine, instruction, None)
            case "Wait":
                yield from _wait(machine, instruction, None)
            case kind:
                assert kind == "Free"
                _free(machine, instruction, None)


@dataclass(frozen=True, slots=True)
class _Parcel:
    """A message, ready to be received."""

    label: str
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def of(cls, message: Message, dtype: torch.dtype | None) -> _Parcel:
        """A message with its floating tensors in `dtype`."""
        kinds = (in_dtype(dtype_of(value.dtype), dtype) for value in message.values)
        return cls(message.label, tuple(value.shape for value in message.values), tuple(kinds))


@dataclass(frozen=True, slots=True)
class Machine:
    """What instructions act on.

    Attributes:
        functions: the segments, lowered.
        values: by name.
        place: the rank's.
        dtype: of all floating tensors, where it is not the program's.
        store: of what is offloaded.
    """

    functions: Sequence[Callable[..., Sequence[Tensor]]]
    values: Environment
    place: Place
    buckets: list[Wire] = field(default_factory=list)
    parcels: list[_Parcel] = field(default_factory=list)
    pending: dict[str, Handle] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    store: Store | None = None
    coming: dict[str, Callable[[], Tensor]] = field(default_factory=dict)

    def learn(self, calls: Sequence[tuple[Op, ...]], messages: Sequence[Message]) -> None:
        """Take in the calls and messages that are new at the ends of their tables."""
        self.buckets.extend(map(wire, calls[len(self.buckets) :]))
        new = messages[len(self.parcels) :]
        self.parcels.extend(_Parcel.of(message, self.dtype) for message in new)

    def read(self, instruction: Instruction) -> list[Tensor]:
        """The operands, weights in the version that the instruction names."""
        if not instruction.version:
            return [self.values[name] for name in instruction.inputs]
        age = instruction.version
        return [self.values.get(older(n, age), self.values[n]) for n in instruction.inputs]

    def bucket(self, instruction: Instruction) -> Wire:
        """What a Start or Wait is about."""
        assert instruction.segment is not None
        return self.buckets[instruction.segment]

    def places(self, bucket: Wire) -> list[Tensor]:
        """Where its results are to lie, if that is said."""
        return [self.values[name] for name in bucket.into]


def _load(machine: Machine, instruction: Instruction, step: Step) -> None:
    if instruction.offloads:
        assert machine.store is not None
        for name, pending in zip(instruction.inputs, instruction.outputs, strict=True):
            machine.coming[pending] = machine.store.load(name)
        return
    assert instruction.microbatch is not None
    operands = step.load(instruction.microbatch)
    for name in instruction.outputs:
        machine.values[name] = operands[name.partition(":")[2]]


def _run(machine: Machine, instruction: Instruction, _: Step | None) -> None:
    assert instruction.segment is not None
    operands = machine.read(instruction)
    if instruction.draws is not None:
        place, before = instruction.draws
        operands[place] = later(operands[place], before)
    results = machine.functions[instruction.segment](*operands)
    machine.values.update(zip(instruction.outputs, results, strict=True))


def _free(machine: Machine, instruction: Instruction, _: Step | None) -> None:
    for name in instruction.inputs:
        machine.values.pop(name, None)


def _stash(machine: Machine, instruction: Instruction, _: Step) -> None:
    kept = [machine.values[name] for name in instruction.inputs]
    if instruction.offloads:
        assert machine.store is not None
        named = zip(instruction.outputs, kept, strict=True)
        kept = [machine.store.stash(name, tensor) for name, tensor in named]
    machine.values.update(zip(instruction.outputs, kept, strict=True))


def _finish(machine: Machine, _: Instruction, step: Step) -> None:
    if machine.store is not None:
        machine.store.settle()
    step.finish(machine.values)


def _start(machine: Machine, instruction: Instruction, _: Step | None) -> Generator[Any, Any, None]:
    axis = instruction.axis or ""
    tensors = machine.read(instruction)
    group, index = machine.place.groups[axis], machine.place.coordinates[axis]
    bucket = machine.bucket(instruction)
    request = start(bucket, tensors, group, index, machine.places(bucket))
    machine.pending[instruction.outputs[0]] = yield request


def _send(machine: Machine, instruction: Instruction, _: Step) -> Generator[Any, Any, None]:
    assert instruction.segment is not None
    assert instruction.peer is not None
    tensors = tuple(machine.values[name].contiguous() for name in instruction.inputs)
    group = Group("pipeline", (machine.place.rank, instruction.peer))
    request = Start("send", group, tensors, label=machine.parcels[instruction.segment].label)
    machine.pending[instruction.outputs[0]] = yield request


def _recv(machine: Machine, instruction: Instruction, _: Step) -> Generator[Any, Any, None]:
    assert instruction.segment is not None
    assert instruction.peer is not None
    parcel = machine.parcels[instruction.segment]
    group = Group("pipeline", (instruction.peer, machine.place.rank))
    request = Start("recv", group, shapes=parcel.shapes, dtypes=parcel.dtypes, label=parcel.label)
    machine.pending[instruction.outputs[0]] = yield request


def _wait(machine: Machine, instruction: Instruction, _: Step | None) -> Generator[Any, Any, None]:
    if instruction.offloads:
        for pending, name in zip(instruction.inputs, instruction.outputs, strict=True):
            machine.values[name] = machine.coming.pop(pending)()
        return
    tensors = yield Wait(machine.pending.pop(instruction.inputs[0]))
    if instruction.peer is not None:
        machine.values.update(zip(instruction.outputs, tensors, strict=True))
        return
    bucket = machine.bucket(instruction)
    results = unpack(bucket, tensors, machine.places(bucket))
    machine.values.update(zip(instruction.outputs, results, strict=True))


def _agree(machine: Machine, instruction: Instruction, step: Step) -> Generator[Any, Any, None]:
    if isinstance(step, Sharing):
        yield from step.share(instruction.axis or "world", machine.values)
    else:
        yield from step.agree()


def _update(machine: Machine, _: Instruction, step: Step) -> Generator[Any, Any, None]:
    yield from step.update(machine.values)


_ACTING: Mapping[Kind, Callable[[Machine, Instruction, Step], None]] = {
    "Load": _load,
    "Run": _run,
    "Free": _free,
    "Stash": _stash,
    "Finish": _finish,
}
_ASKING: Mapping[Kind, Callable[[Machine, Instruction, Step], Generator[Any, Any, None]]] = {
    "Start": _start,
    "Wait": _wait,
    "Send": _send,
    "Recv": _recv,
    "Agree": _agree,
    "Update": _update,
}
