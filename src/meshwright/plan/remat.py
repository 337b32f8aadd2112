"""What a plan's `remat` may say."""

from __future__ import annotations

from typing import Final

from meshwright.errors import UsageError, nearest
from meshwright.plan.facts import Facts, Problem
from meshwright.plan.plan import Plan
from meshwright.plan.size import parse_bytes

__all__ = ["BUDGET", "POLICIES", "budget_of", "remat_is_known"]

POLICIES: Final = ("none", "full", "selective", "marks")
BUDGET: Final = "budget:"


def budget_of(plan: Plan) -> int | None:
    """The bytes of `remat=budget:2GiB`, which a rank may hold in all; None of other plans.

    Raises:
        UsageError: what follows is no size.
    """
    if not plan.remat.startswith(BUDGET):
        return None
    return parse_bytes(plan.remat.removeprefix(BUDGET), "remat=budget:")


def remat_is_known(plan: Plan, facts: Facts) -> tuple[Problem, ...]:
    """What is computed again is a policy there is, or what keeps a budget."""
    del facts
    if plan.remat in POLICIES:
        return ()
    asked = f"plan asks for remat={plan.remat}"
    if not plan.remat.startswith(BUDGET):
        size = "write remat=budget:SIZE, as in remat=budget:2GiB"
        known = size if plan.remat == "budget" else nearest(plan.remat, POLICIES)
        return (Problem(asked, known),)
    try:
        size_ = budget_of(plan)
    except UsageError as error:
        return (Problem(asked, str(error)),)
    return () if size_ else (Problem(asked, "give it the bytes that a rank may hold in all"),)
