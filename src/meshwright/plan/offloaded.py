"""Whether this version offloads what a plan asks for."""

from __future__ import annotations

from meshwright.errors import UsageError
from meshwright.plan.facts import Facts, Problem
from meshwright.plan.offload import offloads
from meshwright.plan.plan import Plan

__all__ = ["offload_is_known"]


def offload_is_known(plan: Plan, facts: Facts) -> tuple[Problem, ...]:
    """What is offloaded are parts there are, to tiers there are, and this version moves them."""
    del facts
    asked = f"plan asks for offload={plan.offload}"
    try:
        found = offloads(plan.offload)
    except UsageError as error:
        return (Problem(asked, str(error)),)
    if plan.asynchronous and found.keys() & {"gradients", "params", "activations"}:
        rule = f"schedule={plan.schedule} keeps several versions of its weights at hand"
        return (Problem(f"{asked}, but {rule}", "use offload=optimizer, or schedule=1f1b"),)
    return ()
