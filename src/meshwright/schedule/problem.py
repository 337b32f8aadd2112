"""What a schedule is searched for: where stages are, how long they take, what a rank may hold.

makespan >= head + work + 0              the first forward that reaches a rank, then all its work
         >= head + F, I of a stage + tail    until its last I, then back to stage 0 and its W
         >= m x lifetime / in flight     memory that is taken for a round trip at a time
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from meshwright.errors import PlanError
from meshwright.schedule.simulate import Seconds, fit

__all__ = ["Memory", "Problem", "fits", "room"]


@dataclass(frozen=True, slots=True)
class Memory:
    """What ranks may hold of activations, in bytes or any other unit.

    Attributes:
        cap: of each rank.
        held: of each stage, for one micro-batch, from the forward until the backward or its `I`.
        owed: of each stage, what is still held from `I` until `W`; by itself as much as `held`.
    """

    cap: tuple[float, ...]
    held: tuple[float, ...]
    owed: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Problem:
    """One step of a pipeline, its order left open.

    Attributes:
        placement: of each stage, its rank.
        microbatches: how many a step has.
        seconds: how long actions take. Backwards may stay whole only if `backward` is given.
        memory: what ranks may hold; None is no bound.
    """

    placement: tuple[int, ...]
    microbatches: int
    seconds: Seconds
    memory: Memory | None = None

    @property
    def ranks(self) -> int:
        """How many ranks there are."""
        return 1 + max(self.placement)

    def stages_of(self, rank: int) -> list[int]:
        """The stages of a rank, first ones first."""
        return [stage for stage, home in enumerate(self.placement) if home == rank]

    def hop(self, stage: int) -> float:
        """The transfer between a stage and the next."""
        same = self.placement[stage] == self.placement[stage + 1]
        return 0.0 if same else self.seconds.transfer[stage]

    def held(self, stage: int) -> float:
        """Memory from a stage's forward until its backward or `I`."""
        return self.memory.held[stage] if self.memory else 0.0

    def owed(self, stage: int) -> float:
        """Memory from a stage's `I` until its `W`."""
        if self.memory is None:
            return 0.0
        return (self.memory.owed or self.memory.held)[stage]

    def cap(self, rank: int) -> float:
        """What the rank may hold."""
        return self.memory.cap[rank] if self.memory else math.inf

    def back(self, stage: int) -> float:
        """The least that one backward costs its rank."""
        parts = self.seconds.inputs[stage] + self.seconds.weights[stage]
        return min(parts, self.seconds.backward[stage]) if self.seconds.backward else parts

    def to_inputs(self, stage: int) -> float:
        """The least from a backward's begin until its inputs' gradient is there."""
        if not self.seconds.backward:
            return self.seconds.inputs[stage]
        return min(self.seconds.inputs[stage], self.seconds.backward[stage])

    def demand(self, rank: int) -> float:
        """What the rank holds at least: one micro-batch on all its stages at once."""
        stages = self.stages_of(rank)
        more = max((self.owed(stage) - self.held(stage) for stage in stages), default=0.0)
        return sum(self.held(stage) for stage in stages) + max(more, 0.0)


def fits(problem: Problem) -> None:
    """Refuse what no order can do.

    Raises:
        PlanError: numbers do not go together, or a rank cannot hold one micro-batch.
    """
    stages = len(problem.placement)
    if set(problem.placement) != set(range(problem.ranks)) or problem.microbatches < 1:
        raise PlanError(
            f"placement {problem.placement} with {problem.microbatches} micro-batches: every rank"
            " from 0 on must hold a stage, and there must be a micro-batch"
        )
    fit(problem.seconds, stages)
    memory = problem.memory
    if memory is not None and (
        (len(memory.cap), len(memory.held)) != (problem.ranks, stages)
        or len(memory.owed) not in (0, stages)
    ):
        raise PlanError(
            f"memory is given for {len(memory.cap)} ranks and {len(memory.held)} stages, but there"
            f" are {problem.ranks} and {stages}"
        )
    for rank in range(problem.ranks):
        if not room(problem.demand(rank), problem.cap(rank)):
            raise PlanError(
                f"rank {rank} may hold {problem.cap(rank):g} of activations, but one micro-batch"
                f" on its stages takes {problem.demand(rank):g}; the least cap that any schedule"
                f" can meet there is {problem.demand(rank):g}: allow it, make micro-batches"
                " smaller, or rematerialise"
            )


def room(need: float, cap: float) -> bool:
    """Whether `need` fits, sums of fractions being what they are."""
    return need <= cap * (1 + 1e-9)
