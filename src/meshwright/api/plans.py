"""Which plan a job gets: what a text, a file or `auto` means in a world."""

from __future__ import annotations

from pathlib import Path

from meshwright.comm.base import Comm, Group, gather_json
from meshwright.job import Job
from meshwright.plan.plan import Plan
from meshwright.plan.toml import AUTO, parse_plan
from meshwright.run.auto import choose_plan

__all__ = ["agreed_plan", "plan_of"]


def agreed_plan(asked: str | Plan, job: Job, comm: Comm) -> tuple[Plan, list[str]]:
    """The plan of all ranks, and what to tell the user of its choice.

    `auto` goes by free memory, which differs from rank to rank: all take what the first one chose.
    """
    size = comm.world.size
    plan = plan_of(asked, job, size)
    if asked != AUTO or size == 1:
        return plan, []
    text, *_ = comm.perform(gather_json(plan.text(), Group.world(size), "plan"))
    told = (
        f"plan {text} chosen: the first of data, zero1, zero2, zero3 whose state fits the memory; "
        "time was not compared"
    )
    return Plan.parse(text), [told]


def plan_of(plan: str | Plan, job: Job, world: int) -> Plan:
    """The plan that a text, a file or `auto` means for this job and world."""
    if isinstance(plan, Plan):
        return plan.filled(world)
    found = parse_plan(plan, lambda path: Path(path).read_text())
    if isinstance(found, Plan):
        return found.filled(world)
    return choose_plan(job, world)
