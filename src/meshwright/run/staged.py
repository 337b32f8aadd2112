"""Staged: a job's traced micro-batch cut into the stages of a plan, and where its state lives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from meshwright.errors import PlanError
from meshwright.plan.named import ASYNCHRONOUS, OWN
from meshwright.plan.plan import Plan
from meshwright.program.cost import op_costs
from meshwright.program.cut import at_modules, cheapest
from meshwright.program.placing import Placement, placed_by, placed_like
from meshwright.program.program import Program
from meshwright.run.remat import kept_by
from meshwright.schedule.action import Schedule
from meshwright.schedule.check import check
from meshwright.schedule.estimate import estimated
from meshwright.schedule.named import schedule_of
from meshwright.schedule.placement import looped
from meshwright.schedule.problem import Memory
from meshwright.schedule.replicated import replicated
from meshwright.schedule.search import search
from meshwright.schedule.simulate import Seconds
from meshwright.schedule.text import from_text

__all__ = ["SECONDS_PER_BYTE", "Staged", "staged"]

SECONDS_PER_BYTE = 1e-9
"""Of what crosses a cut: memory's order of magnitude, enough to prefer a narrow cut."""


@dataclass(frozen=True, slots=True)
class Staged:
    """How a traced micro-batch is cut.

    Attributes:
        plan: that asks for it.
        program: the micro-batch of the first step.
        placement: of its ops.
        homes: of each `model/` parameter and `buffer/`, the pipeline ranks that hold it.
    """

    plan: Plan
    program: Program
    placement: Placement
    homes: Mapping[str, tuple[int, ...]]

    def of(self, program: Program) -> Placement:
        """The stages of another micro-batch: of another size, or of an evaluation."""
        if program is self.program:
            return self.placement
        return placed_like(program, self.program, self.placement)

    def schedule(self, name: str, microbatches: int) -> Schedule:
        """The order of a step with so many micro-batches."""
        if name != "search":
            return _schedule(self.plan, name, microbatches)
        return searched(self.seconds(), self.plan, microbatches)

    def seconds(self) -> Seconds:
        """About how long the stages take for a micro-batch."""
        return estimated(
            self.program,
            self.placement,
            op_costs(self.program),
            SECONDS_PER_BYTE,
            kept=kept_by(self.plan, self.program, None),
        )


@cache
def searched(seconds: Seconds, plan: Plan, microbatches: int) -> Schedule:
    """The best order found for these times that holds no more than 1F1B does."""
    placement = looped(plan.pipeline, plan.virtual)
    memory = Memory((float(len(placement)),) * plan.pipeline, (1.0,) * len(placement))
    return search(placement, microbatches, seconds, memory, effort=2_000).schedule


def staged(program: Program, plan: Plan) -> Staged:
    """Cut a traced micro-batch as a plan says: where its modules begin, or by cost.

    Raises:
        PlanError: it cannot be cut so.
    """
    schedule = _schedule(plan, plan.order, plan.microbatches)
    stages = schedule.stages
    if plan.cuts:
        positions = at_modules(program, plan.cuts)
    elif stages == 1:
        positions = ()
    else:
        positions = cheapest(program, stages, op_costs(program), SECONDS_PER_BYTE)
    placement = placed_by(program, positions)
    homes = {
        name: tuple(sorted({schedule.placement[stage] for stage in stages_})) or (0,)
        for name, stages_ in placement.homes.items()
        if not name.startswith("constant/")
    }
    return Staged(plan, program, placement, homes)


def _schedule(plan: Plan, name: str, microbatches: int) -> Schedule:
    """The schedule; an evaluation's has the stages of the training's where those are.

    Asynchronous ones have the stages of 1f1b; their order goes beyond a step (`pipedream.py`).
    """
    if name == OWN:
        return own(plan)
    if plan.replicas is not None and name not in (*ASYNCHRONOUS, "gpipe", "fill-drain"):
        return replicated(plan.widths, microbatches)
    name = "1f1b" if name in ASYNCHRONOUS else name
    made = schedule_of(name, plan.pipeline, microbatches, plan.virtual)
    if name != "fill-drain":
        return made
    training = own(plan) if plan.order == OWN else _schedule(plan, plan.order, 1)
    return _forward_only(training, microbatches)


def own(plan: Plan) -> Schedule:
    """The schedule that a plan's actions write.

    Raises:
        PlanError: they are not actions, not all that a step needs, or no order in which ranks run.
    """
    schedule = from_text("\n".join(plan.actions), "of the plan")
    check(schedule)
    if schedule.microbatches != plan.microbatches:
        raise PlanError(
            f"plan's actions are of {schedule.microbatches} micro-batches, but it has "
            f"microbatches={plan.microbatches}; use microbatches={schedule.microbatches}"
        )
    return schedule


def _forward_only(training: Schedule, microbatches: int) -> Schedule:
    """Forwards of a training's stages, one micro-batch after the other through all of a rank's."""
    ranks = tuple(
        tuple(
            type(actions[0])(stage, "F", k)
            for k in range(microbatches)
            for stage, rank in enumerate(training.placement)
            if rank == here
        )
        for here, actions in enumerate(training.ranks)
    )
    return Schedule("fill-drain", training.placement, microbatches, ranks)
