"""Bubbles of a plan's pipeline, and what to tell its user of them."""

from __future__ import annotations

from dataclasses import replace

from meshwright.plan.plan import Plan
from meshwright.schedule.action import Schedule
from meshwright.schedule.named import SCHEDULES, schedule_of
from meshwright.schedule.pipedream import Asynchronous, asynchronous_of
from meshwright.schedule.simulate import Seconds, account, timeline, uniform

__all__ = ["bubble", "endless", "idle", "pipeline_notes"]

_ENOUGH = 4
"""Micro-batches for each stage, with which bubbles are small (Huang et al. 2019, section 3)."""


def bubble(plan: Plan) -> float:
    """The share of a step in which pipeline ranks stand idle, if all stages take equal times.

    Forwards and both parts of backwards take equal times too; transfers take none.
    """
    schedule = schedule_of(plan.order, plan.pipeline, plan.microbatches, plan.virtual)
    return idle(schedule, uniform(schedule.stages))


def idle(schedule: Schedule, seconds: Seconds) -> float:
    """The share of a step in which ranks stand idle, if stages take so long."""
    return account(timeline(schedule, seconds)).fraction


def pipeline_notes(plan: Plan, batch_size: int) -> tuple[str, ...]:
    """What to tell the user of a plan's pipeline: idle ranks, or gradients of old weights."""
    if plan.asynchronous:
        return (_staleness(plan),)
    return _bubble_notes(plan, batch_size)


def endless(plan: Plan) -> Asynchronous | None:
    """The pipeline of a plan that never flushes; None of one that does."""
    if not plan.asynchronous:
        return None
    replicas = (1,) * plan.pipeline if plan.replicas is None else plan.widths
    return asynchronous_of(plan.order, replicas, plan.microbatches, plan.virtual)


def _staleness(plan: Plan) -> str:
    """How old the weights are that gradients are of, from the first stage on."""
    pipe = endless(plan)
    assert pipe is not None
    ages = (pipe.staleness(stage) for stage in range(pipe.stages))
    told = ", ".join(str(most) if least == most else f"{least} to {most}" for least, most in ages)
    return (
        f"schedule={plan.order} never flushes, so its numbers are not those of one device: "
        f"gradients are of weights that lack the last minibatches, by stage {told} of them; "
        "mw verify compares it with its own recurrence"
    )


def _bubble_notes(plan: Plan, batch_size: int) -> tuple[str, ...]:
    """A warning where a step has fewer micro-batches than its schedule can keep ranks busy with."""
    if plan.pipeline == 1 or plan.order not in SCHEDULES or plan.replicas is not None:
        return ()
    if plan.microbatches >= _least(plan):
        return ()
    parts = "1 micro-batch" if plan.microbatches == 1 else f"{plan.microbatches} micro-batches"
    said = (
        f"{parts} a step cannot keep pipeline={plan.pipeline} busy under schedule={plan.order}: "
        f"ranks stand idle {bubble(plan):.0%} of the time"
    )
    most = batch_size // (plan.sizes["data"] * plan.sizes["expert"])
    more = min(most, _ENOUGH * plan.pipeline)
    if more <= plan.microbatches:
        return (f"{said}; a larger batch_size allows more of them",)
    better = bubble(replace(plan, microbatches=more))
    return (f"{said}; with microbatches={more} it is {better:.0%}",)


def _least(plan: Plan) -> int:
    """The fewest micro-batches with which every rank has work while the others do."""
    ahead = {"zb-h2": 2 * plan.pipeline - 1, "zb-v": 2 * plan.pipeline - 1}
    return {**ahead, "dualpipe-v": 2 * plan.pipeline}.get(plan.order, plan.pipeline)
