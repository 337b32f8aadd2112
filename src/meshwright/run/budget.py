"""`remat=budget:2GiB`: what is saved for the backward so that every rank's bill keeps the budget.

The choice is made on an account of the micro-batch; what that leaves out (gathered weights, buffers
of collectives, messages) is learnt from the bill of the compiled ranks, and taken off.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from meshwright.errors import PlanError
from meshwright.plan.size import bytes_text
from meshwright.predict.remat import fitting, least
from meshwright.predict.saving import Saving, account, saving_of
from meshwright.program.assemble import complete_unit
from meshwright.program.cost import op_costs
from meshwright.program.fused import by_part
from meshwright.program.placing import Placement
from meshwright.program.program import Program
from meshwright.program.sizes import local_bytes
from meshwright.run.bill import bills
from meshwright.run.build import Build, Micro
from meshwright.run.remat import Chosen
from meshwright.schedule.action import Action
from meshwright.schedule.locals import open_unit

__all__ = ["choose"]

_TRIES = 8
_NEAR = 1.002
"""How much more room is worth another try."""

_CALL = 2e-6
"""Seconds that an op costs beside its work."""


@dataclass(slots=True)
class _Part:
    """What the ranks of one pipeline rank do of a micro-batch.

    Attributes:
        saving: what may be chosen.
        kept: what is saved now.
        limit: bytes that the account may come to; None where all may be saved.
        good: what was found to keep the budget.
    """

    saving: Saving
    kept: frozenset[int]
    limit: int | None = None
    good: frozenset[int] | None = None

    @classmethod
    def of(cls, saving: Saving) -> _Part:
        """One that saves everything."""
        return cls(saving, frozenset(saving.storages))

    def saves_all(self, kept: frozenset[int]) -> bool:
        """Whether nothing is computed again."""
        return self.saving.storages.keys() <= kept

    def solve(self) -> bool:
        """Choose within the limit; whether that could be done."""
        best = None if self.limit is None else fitting(self.saving, self.limit)
        if best is not None:
            self.kept = best.kept
        return best is not None

    def learn(self, held: int, budget: int) -> None:
        """Note what ranks hold in truth, and what the account may come to for that."""
        told = account(self.saving, self.kept)
        if held <= budget and (self.good is None or told.cost < self._cost()):
            self.good = self.kept
        limit, before = budget - (held - told.peak), self.limit
        if before is not None and held > budget:
            limit = min(limit, before - 1)
        near = before is None or limit < before * _NEAR
        done = near if held <= budget else self.good is not None
        self.limit = None if done else limit

    def _cost(self) -> float:
        return account(self.saving, self.good or ()).cost


def choose(build: Build, micros: Sequence[Micro], budget: int) -> Chosen:
    """What is saved in a step of these micro-batches.

    Raises:
        PlanError: no choice keeps the budget; it says the least that can.
    """
    program = open_unit(build.unit(micros[0]).program, build.states)
    parts = _parts(build, program)
    for _ in range(_TRIES):
        for part, held in zip(parts, _held(build, micros, program, parts), strict=True):
            part.learn(held, budget)
        solved = [part.solve() for part in parts]
        if not any(solved):
            break
    if all(part.good is not None and part.saves_all(part.good) for part in parts):
        return Chosen(program, None)
    for part in parts:
        part.kept = least(part.saving).kept if part.good is None else part.good
    held = max(_held(build, micros, program, parts))
    if held <= budget:
        return Chosen(program, frozenset().union(*(part.kept for part in parts)))
    raise PlanError(
        f"plan asks for remat={build.plan.remat}, but the least that a rank can hold is "
        f"{bytes_text(held)} ({held} bytes); give it that, or split more: zero3, more "
        "microbatches, tensor"
    )


def _held(
    build: Build, micros: Sequence[Micro], program: Program, parts: Sequence[_Part]
) -> list[int]:
    """What ranks hold with what the parts save now."""
    whole = all(part.saves_all(part.kept) for part in parts)
    kept = frozenset[int]().union(*(part.kept for part in parts))
    return _bills(build, micros, Chosen(program, None if whole else kept))


def _bills(build: Build, micros: Sequence[Micro], chosen: Chosen) -> list[int]:
    """By pipeline rank, the bytes of the rank that holds most."""
    trial = replace(build, chosen=chosen, lists={}, micros={})
    found = [0] * len(build.mesh.stages)
    for rank, parts in enumerate(bills(trial, micros)):
        stage, _ = build.mesh.coordinates(rank)
        found[stage] = max(found[stage], sum(parts.values()))
    return found


def _parts(build: Build, program: Program) -> list[_Part]:
    """What each pipeline rank does."""
    completed = complete_unit(
        program, build.axes, by_part(build.states), sequence=build.plan.sequence == "tensor"
    )
    _, _, coordinates = build.within(0)
    sizes = local_bytes(program, completed, build.axes, coordinates)
    costs = [seconds + _CALL for seconds in op_costs(program)]
    if build.stages is None:
        return [_Part.of(saving_of(program, sizes, costs))]
    placement = build.stages.of(program)
    schedule = build.stages.schedule(build.plan.order, build.plan.microbatches)
    found = []
    for rank, actions in enumerate(schedule.ranks):
        mine = {stage for stage, home in enumerate(schedule.placement) if home == rank}
        part, numbers = _of_stages(program, placement, mine)
        flying = _in_flight(actions)
        copies = {
            k: flying.get(stage, 1)
            for k, number in enumerate(numbers)
            if (stage := placement.stages[number]) is not None
        }
        own = [costs[number] for number in numbers]
        found.append(_Part.of(saving_of(part, sizes, own, copies)))
    return found


def _of_stages(
    program: Program, placement: Placement, stages: set[int]
) -> tuple[Program, list[int]]:
    """The part of a micro-batch that some stages do, and the numbers of its ops."""
    homes = placement.stages
    numbers = [n for n in range(len(program.ops)) if homes[n] is None or homes[n] in stages]
    ops = tuple(program.ops[number] for number in numbers)
    made = {value for op in ops for value in op.results}
    read = {value for op in ops for value in op.inputs} - made
    inputs = tuple((str(value), value) for value in sorted(read))
    outputs = tuple((name, value) for name, value in program.outputs if value in made)
    return Program(program.values, inputs, ops, outputs), numbers


def _in_flight(actions: Sequence[Action]) -> Mapping[int, int]:
    """Of each stage, how many micro-batches are between its forward and the end of its backward."""
    now, most = Counter[int](), Counter[int]()
    for action in actions:
        now[action.stage] += {"F": 1, "I": 0}.get(action.kind, -1)
        most[action.stage] = max(most[action.stage], now[action.stage])
    return most
