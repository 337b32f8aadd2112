"""Plans one or two changes away from a plan, priced: what each would move and need."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from meshwright.compile.unit import Unit
from meshwright.errors import PlanError
from meshwright.job import Job
from meshwright.plan.plan import Plan
from meshwright.program.explain import collectives
from meshwright.run.bill import bills
from meshwright.run.build import Build
from meshwright.run.form import first_micros
from meshwright.run.prepare import prepare
from meshwright.run.stages import describe_pipeline

__all__ = ["Priced", "lighter", "price", "priced", "smaller"]


@dataclass(frozen=True, slots=True)
class Priced:
    """A plan, the bytes that a rank moves in a step of it, and those that the neediest needs."""

    plan: Plan
    moved: int
    memory: int


def lighter(plan: Plan) -> Iterator[Plan]:
    """Plans for as many ranks that may move less, the smallest changes first.

    Lower ZeRO stages, fewer micro-batches, ranks handed from `tensor` to `data` or back.
    """
    stages = [replace(plan, zero=zero) for zero in reversed(range(plan.zero))]
    parts = [replace(plan, microbatches=1)]
    both = [replace(plan, zero=0, microbatches=1)]
    yield from _others(plan, (*stages, *parts, *both, *_handed(plan)))


def smaller(plan: Plan, batch_size: int) -> Iterator[Plan]:
    """Plans for as many ranks that may need less memory, the smallest changes first.

    Higher ZeRO stages, more micro-batches, ranks handed from `data` to `tensor`; last, ZeRO-3
    together with each of these.
    """
    data = plan.data or 1
    stages = [replace(plan, zero=zero) for zero in range(plan.zero + 1, 4)]
    most = batch_size // data
    parts = [
        replace(plan, microbatches=plan.microbatches * k)
        for k in (2, 4)
        if plan.microbatches * k <= most
    ]
    others = (*parts, *_handed(plan))
    both = [replace(found, zero=3) for found in others]
    yield from _others(plan, (*stages, *others, *both))


def _handed(plan: Plan) -> list[Plan]:
    """Ranks handed over between `data` and `tensor`."""
    data, tensor = plan.data or 1, plan.tensor
    back = [replace(plan, data=data * 2, tensor=tensor // 2)] if tensor % 2 == 0 else []
    return back + [
        replace(plan, data=data // k, tensor=tensor * k) for k in (2, 4) if data % k == 0
    ]


def _others(plan: Plan, found: Iterable[Plan]) -> Iterator[Plan]:
    """Each of `found` once, made legal."""
    seen = {plan}
    for other in map(_fitting, found):
        if other not in seen:
            seen.add(other)
            yield other


def _fitting(plan: Plan) -> Plan:
    """The plan without what means nothing on its axes: hybrid groups, ZeRO on one rank."""
    data = plan.data or 1
    zero = plan.zero if data > 1 else 0
    keeps = zero and plan.shard is not None and data % plan.shard == 0
    return replace(plan, zero=zero, shard=plan.shard if keeps else None)


def priced(job: Job, plans: Iterable[Plan]) -> Iterator[Priced]:
    """The plans that the job can run under, priced; nothing is initialised or started."""
    data = job.data()
    units: dict[tuple[Hashable, ...], Unit] = {}
    for plan in plans:
        try:
            yield price(prepare(job, plan, plan.ranks, None, data, units), data)
        except PlanError:
            continue


def price(build: Build, data: Any = None) -> Priced:
    """What rank 0 moves and needs, which has the larger part of what does not divide.

    Of a pipeline, what the ranks that move and need most do.

    Args:
        build: of the job and plan.
        data: what `job.data()` returned, where it was called already.
    """
    micros = first_micros(build, data)
    piped = describe_pipeline(build, micros)
    if piped is not None:
        moved = max(each["moved"] + each["sent"] for each in piped["traffic"])
        return Priced(build.plan, moved, max(sum(bill.values()) for bill in bills(build, micros)))
    compiled = build.lowered(0, micros).compiled
    moved = sum(row.bytes for row in collectives(compiled, build.lines(0)))
    return Priced(build.plan, moved, sum(next(bills(build, micros)).values()))
