"""Plans one or two changes away from a plan, priced: what each would move and need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from meshwright.errors import PlanError
from meshwright.job import Job
from meshwright.plan.plan import Plan
from meshwright.program.explain import collectives
from meshwright.run.build import Build
from meshwright.run.describe import bills
from meshwright.run.form import first_micros
from meshwright.run.prepare import prepare

__all__ = ["Priced", "alternatives", "price", "priced"]


@dataclass(frozen=True, slots=True)
class Priced:
    """A plan, the bytes that a rank moves in a step of it, and those that the neediest needs."""

    plan: Plan
    moved: int
    memory: int


def alternatives(plan: Plan, batch_size: int) -> Iterator[Plan]:
    """Other plans for as many ranks, the smallest changes first.

    Other ZeRO stages, other numbers of micro-batches, ranks handed from `data` to `tensor` or back;
    last, ZeRO-3 together with each of the others.
    """
    data = plan.data or 1
    stages = [replace(plan, zero=zero) for zero in range(4) if zero != plan.zero and data > 1]
    parts = [1] if plan.microbatches > 1 else []
    parts += [plan.microbatches * k for k in (2, 4) if batch_size >= plan.microbatches * k * data]
    split = [replace(plan, microbatches=count) for count in parts]
    handed = [
        replace(plan, data=data // k, tensor=plan.tensor * k) for k in (2, 4) if data % k == 0
    ]
    if plan.tensor % 2 == 0:
        handed.append(replace(plan, data=2 * data, tensor=plan.tensor // 2))
    others = [_fitting(found) for found in (*split, *handed)]
    both = [replace(found, zero=3) for found in others if plan.zero < 3 and (found.data or 1) > 1]
    seen = {plan}
    for found in (*map(_fitting, stages), *others, *both):
        if found not in seen:
            seen.add(found)
            yield found


def _fitting(plan: Plan) -> Plan:
    """The plan without what means nothing on its axes: hybrid groups, ZeRO on one rank."""
    data = plan.data or 1
    zero = plan.zero if data > 1 else 0
    keeps = zero and plan.shard is not None and data % plan.shard == 0
    return replace(plan, zero=zero, shard=plan.shard if keeps else None)


def priced(job: Job, plans: Iterable[Plan]) -> Iterator[Priced]:
    """The plans that the job can run under, priced; nothing is initialised or started."""
    for plan in plans:
        try:
            yield price(prepare(job, plan, plan.ranks))
        except PlanError:
            continue


def price(build: Build) -> Priced:
    """What rank 0 moves and needs, which has the larger part of what does not divide."""
    micros = first_micros(build)
    compiled = build.lowered(0, micros).compiled
    moved = sum(row.bytes for row in collectives(compiled, build.axes))
    return Priced(build.plan, moved, sum(next(bills(build, micros)).values()))
