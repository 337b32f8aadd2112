"""Whether a plan makes the gradients of a batch's slices, which AdaScale looks at one by one."""

from __future__ import annotations

from meshwright.plan.facts import Facts, Problem
from meshwright.plan.plan import Plan

__all__ = ["slices_are_made", "split_slices"]


def slices_are_made(plan: Plan, facts: Facts) -> tuple[Problem, ...]:
    """A slice is what a data rank has of a micro-batch, or a micro-batch."""
    slices, parts = facts.slices, plan.microbatches
    if slices is None or plan.asynchronous:
        return ()
    ranks = 1 if plan.replicas is not None else plan.sizes["data"]
    if slices in (ranks * parts, parts):
        return ()
    fits = f"microbatches={slices}"
    if slices % ranks == 0:
        fits = f"microbatches={slices // ranks}" if slices > ranks else "microbatches=1"
    return (
        Problem(
            f"adascale needs scale={slices} slices of the batch, but data={ranks} and "
            f"microbatches={parts} make {ranks * parts}",
            f"use {fits}" + (f" and data={ranks}" if ranks > 1 else ""),
        ),
    )


def split_slices(plan: Plan, slices: int) -> bool:
    """Whether ranks have slices of their own; else each micro-batch is one."""
    return slices != plan.microbatches
