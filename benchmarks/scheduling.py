"""What schedules and their execution cost beside the model: seconds, without any contestant."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from meshwright import Job
from meshwright.comm.base import Handle, Start, Wait
from meshwright.plan.plan import Plan
from meshwright.program.instruction import InstructionList
from meshwright.run.executor import Committed, Place, execute
from meshwright.run.form import first_micros
from meshwright.run.prepare import prepare
from meshwright.schedule.check import check
from meshwright.schedule.named import schedule_of

STAGES, MICROBATCHES = 64, 512
NAMES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v", "dualpipe-v")
PLAN = "pipeline=2,schedule=1f1b,microbatches=32"


def seconds_of_schedules(rounds: int) -> dict[str, list[float]]:
    """Of each schedule, to make and to check it."""
    found: dict[str, list[float]] = {}
    for name in NAMES:
        virtual = 2 if name == "interleaved" else 1
        for _ in range(rounds):
            began = time.perf_counter()
            check(schedule_of(name, STAGES, MICROBATCHES, virtual))
            found.setdefault(name, []).append(time.perf_counter() - began)
    return found


@dataclass(frozen=True, slots=True)
class Overhead:
    """Seconds per instruction of each step, and how many instructions there were of each kind."""

    seconds: list[float]
    kinds: Mapping[str, int]


def overhead(steps: int) -> Overhead:
    """The executor alone: a real list, whose segments and messages give tensors there are."""
    program, place = _program()
    named = {name for instruction in program.body for name in instruction.inputs}
    values = {name: torch.zeros(()) for name in named}
    work = _Nothing({name.partition(":")[2]: torch.zeros(()) for name in named})
    functions = [_given(len(segment.outputs)) for segment in program.segments]
    running = execute(program, functions, values, place)
    next(running)
    found = []
    for _ in range(steps):
        began = time.perf_counter()
        _step(running, work)
        found.append((time.perf_counter() - began) / len(program.body))
    return Overhead(found, Counter(instruction.kind for instruction in program.body))


def _program() -> tuple[InstructionList, Place]:
    job = Job(
        model=lambda: nn.Sequential(*(nn.Linear(2, 2) for _ in range(8))),
        loss=lambda model, batch: model(batch).square().mean(),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        data=lambda: [*torch.zeros(32, 2)],
        batch_size=32,
    )
    plan = Plan.parse(PLAN)
    build = prepare(job, plan, plan.ranks)
    return build.lowered(0, first_micros(build)).compiled.instructions, build.place(0)


def _given(count: int) -> Callable[..., list[Tensor]]:
    ready = [torch.zeros(())] * count
    return lambda *_: ready


def _step(running: Generator[Any, Any, None], work: _Nothing) -> None:
    """One step; what is awaited is there."""
    request = running.send(work)
    while not isinstance(request, Committed):
        match request:
            case Start():
                request = running.send(Handle(request, None))
            case Wait(handle):
                request = running.send((torch.zeros(()),) * len(handle.request.shapes or ()))


@dataclass(frozen=True, slots=True)
class _Nothing:
    """A step without any work of its own."""

    operands: Mapping[str, Tensor]

    def load(self, _: int) -> Mapping[str, Tensor]:
        return self.operands

    def finish(self, _: Any) -> None:
        return

    def agree(self) -> Generator[Any, Any, None]:
        yield from ()

    def update(self, _: Any) -> None:
        return

    def commit(self, _: Any) -> None:
        return
