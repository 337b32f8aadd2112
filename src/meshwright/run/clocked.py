"""Clocked: a pipeline's cuts by what its ops take on this machine, instead of by an estimate.

The micro-batch is run here, whole, op by op. What is found is written into the plan as names of
modules, so that all ranks of a run cut alike, whatever machine each is on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from meshwright.comm.local import LocalWorld
from meshwright.compile.interpret import interpret
from meshwright.errors import UsageError
from meshwright.job import Job
from meshwright.plan.plan import Plan
from meshwright.program.cut import at_modules, cheapest, named_places, stage_seconds
from meshwright.program.program import Op, Program
from meshwright.run.data.samples import open_source
from meshwright.run.prepare import prepare
from meshwright.run.staged import SECONDS_PER_BYTE, staged
from meshwright.run.step import Policy
from meshwright.run.worker import Worker

__all__ = ["Clocked", "clocked", "first_unit", "op_seconds"]

_TIMES = 3
"""How often each op is run; the quickest counts, which others on the machine disturbed least."""


@dataclass(frozen=True, slots=True)
class Clocked:
    """A plan with cuts by measured time.

    Attributes:
        plan: with `cuts`.
        seconds: of each stage, a micro-batch's forward and backward, on one rank of this machine.
    """

    plan: Plan
    seconds: tuple[float, ...]


def clocked(job: Job, plan: Plan) -> Clocked:
    """Cut a plan's pipeline where a module begins, by what ops take here.

    Holds the whole model, one batch and all activations of a micro-batch in this process.

    Args:
        job: whose first micro-batch is run.
        plan: with a pipeline, and without `cuts`.

    Raises:
        UsageError: the plan has no pipeline, or says where it is cut.
        PlanError: there are fewer modules to begin a stage with than the plan has stages.
    """
    if plan.stages == 1 or plan.cuts:
        has = f"cuts={list(plan.cuts)}" if plan.cuts else "no pipeline"
        raise UsageError(
            f"the plan has {has}, but measuring is for a pipeline whose cuts are to be found; use "
            "pipeline=2 or more, without cuts"
        )
    program, inputs = first_unit(job, plan)
    seconds = op_seconds(program, inputs)
    places = named_places(program)
    chosen = cheapest(program, plan.stages, seconds, SECONDS_PER_BYTE, tuple(places))
    found = replace(plan, cuts=tuple(places[place] for place in chosen))
    assert at_modules(program, found.cuts) == chosen
    staged(program, found)  # can it be cut so
    return Clocked(found, stage_seconds(program, chosen, seconds))


def first_unit(job: Job, plan: Plan) -> tuple[Program, Mapping[str, Tensor]]:
    """The first micro-batch's program on one rank, and its operands."""
    alone = Plan(data=1, microbatches=plan.microbatches, precision=plan.precision)
    build = prepare(job, alone, 1)
    source = open_source(job.data(), batch_size=job.batch_size, seed=job.seed, collate=job.collate)
    try:
        worker = Worker(build, 0, source, Policy())
        fetched = worker.fetch(0)
        unit = build.unit(fetched.micros[0])
        operands = worker.work(fetched, None).load(0)
        return unit.program, {**worker.state.values, **unit.constants, **operands}
    finally:
        source.close()


def op_seconds(program: Program, inputs: Mapping[str, Tensor]) -> tuple[float, ...]:
    """Seconds of each op of a program on one rank, the quickest of a few runs."""
    runs = [_run(program, inputs) for _ in range(_TIMES)]
    return tuple(map(min, zip(*runs, strict=True)))


def _run(program: Program, inputs: Mapping[str, Tensor]) -> Sequence[float]:
    stamps = [time.perf_counter()]

    def watch(number: int, op: Op, values: Mapping[int, Tensor]) -> None:
        del number, op, values
        stamps.append(time.perf_counter())

    with torch.no_grad():
        LocalWorld(1).perform([interpret(program, inputs, watch=watch)])
    return [after - before for before, after in pairwise(stamps)]
