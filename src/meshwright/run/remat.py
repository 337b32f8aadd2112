"""Which forward values a job's plan saves for the backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from meshwright.plan.plan import Plan
from meshwright.plan.remat import BUDGET
from meshwright.program.cost import flops
from meshwright.program.keep import POLICIES, full
from meshwright.program.placing import forward_end
from meshwright.program.program import Program
from meshwright.program.remat import Forward

__all__ = ["Chosen", "describe_remat", "kept_by"]


@dataclass(frozen=True, slots=True)
class Chosen:
    """What was chosen for a budget.

    Attributes:
        program: the micro-batch for which it was.
        kept: its forward values that are saved; None where all are.
    """

    program: Program
    kept: frozenset[int] | None

    def of(self, program: Program) -> frozenset[int] | None:
        """The same of another micro-batch; of one that does other ops, what blocks begin with."""
        alike = [op.name for op in program.ops] == [op.name for op in self.program.ops]
        if self.kept is None or alike:
            return self.kept
        return full(program)


def kept_by(plan: Plan, program: Program, chosen: Chosen | None) -> frozenset[int] | None:
    """The forward values that are saved; None where all that the backward reads are.

    Args:
        plan: that says so.
        program: a traced micro-batch, fused parameters in parts.
        chosen: for the plan's budget; None while that is being chosen.
    """
    if plan.remat == "none" or forward_end(program) == len(program.ops):
        return None
    if plan.remat.startswith(BUDGET):
        return None if chosen is None else chosen.of(program)
    if plan.remat == "full" and plan.pipeline > 1:  # a stage is a block (GPipe, section 2.3)
        return frozenset()
    return POLICIES[plan.remat](program)


def describe_remat(plan: Plan, program: Program, kept: frozenset[int] | None) -> dict[str, Any]:
    """What is computed again, as plain data: of one micro-batch, over all its ranks.

    Args:
        plan: that asks for it.
        program: the micro-batch.
        kept: its forward values that are saved.
    """
    forward, values = Forward.of(program), program.values
    everything = frozenset(forward.makers)
    saved = everything if kept is None else {forward.root[value] for value in kept}
    again = forward.repeats(saved)
    work = [flops(op, program) for op in program.ops]
    return {
        "policy": plan.remat,
        "bytes": sum(values[v].bytes for v in forward.saved(saved)),
        "all_bytes": sum(values[v].bytes for v in forward.saved(everything)),
        "ops": len(again),
        "of_ops": forward.end,
        "flops": sum(work[number] for number in again),
        "of_flops": sum(work),
    }
