"""Locals: a stage's tasks as one rank's programs, partitioned over the axes of its stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from meshwright.errors import PlanError
from meshwright.plan.mesh import Axis
from meshwright.program.assemble import accumulated, complete_unit, in_one_piece, unit_outputs
from meshwright.program.dispatch import routed
from meshwright.program.donate import donated
from meshwright.program.fused import by_part, fused_of
from meshwright.program.layout import Layout, Partial, Placement, Shard
from meshwright.program.opened import opened
from meshwright.program.overlap import overlapped
from meshwright.program.partition import Local, partition
from meshwright.program.parts import Parts
from meshwright.program.placing import Placement as Stages
from meshwright.program.program import Program
from meshwright.program.propagate import Completed
from meshwright.program.rules import placed
from meshwright.program.stage import Key, Task, Tasks, named
from meshwright.program.zero import StateLayouts

__all__ = ["Micro"]


@dataclass(slots=True)
class Micro:
    """A form of micro-batch over the axes of a stage: its tasks, and what they are on one rank."""

    program: Program
    axes: Sequence[Axis]
    coordinates: Mapping[str, int]
    states: Mapping[str, StateLayouts]
    tasks: Tasks
    completed: Completed
    fused: Mapping[str, Parts]
    known: dict[tuple[Key, frozenset[str], frozenset[str]], tuple[Local, Program, Completed]] = (
        field(default_factory=dict)
    )
    lies: dict[tuple[Key, int], Layout] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        program: Program,
        unit: Program,
        stages: Stages,
        axes: Sequence[Axis],
        coordinates: Mapping[str, int],
        states: Mapping[str, StateLayouts],
        *,
        sequence: bool,
        kept: frozenset[int] | None,
    ) -> Micro:
        """Cut and complete a traced micro-batch.

        Args:
            program: the traced one.
            unit: the same as it is placed: fused parameters in parts.
            stages: of its ops.
            axes: of the rank's stage.
            coordinates: the rank's, in its stage.
            states: layouts by parameter.
            sequence: split over `tensor` along the sequence what it would leave whole.
            kept: forward values that backwards may read, making others again; None: all they need.
        """
        each = by_part(states)
        whole = accumulated(unit, first=False)
        completed = complete_unit(whole, axes, each, sequence=sequence)
        fused = fused_of({name: state.work for name, state in states.items()})
        tasks = Tasks(whole, stages, kept=kept)
        return cls(program, axes, coordinates, states, tasks, completed, fused)

    def local(
        self, key: Key, assigned: frozenset[str], last: frozenset[str]
    ) -> tuple[Local, Program, Completed]:
        """A task on this rank; the program that it is a part of, and how that was completed.

        Args:
            key: which task.
            assigned: the sums that are new, not added to.
            last: those that are complete with it.
        """
        task = self.tasks.task(key, assigned)
        mine = frozenset(task.sums)
        known = (key, mine & assigned, mine & last)
        if known not in self.known:
            self.known[known] = self._made(task, mine & last)
        return self.known[known]

    def _made(self, task: Task, last: frozenset[str]) -> tuple[Local, Program, Completed]:
        key = task.stage, task.kind
        completed = self._completed(task)
        outputs = self._outputs(task, last)
        local = partition(task.program, completed, self.axes, self.coordinates, outputs)
        for name, value in local.program.outputs:
            if name.startswith("value/"):
                self.lies[key, int(name.removeprefix("value/"))] = local.origin[value][1]
        local = donated(routed(local, self.axes))
        local = in_one_piece(local, self.program, self.fused, self.states, last=bool(last))
        local = replace(local, program=overlapped(local.program))
        return local, task.program, completed

    def _completed(self, task: Task) -> Completed:
        """What was completed for the whole, of this task's ops."""
        given = dict(zip((n for n, _ in self.tasks.whole.inputs), self.completed.inputs,
                         strict=True))  # fmt: skip
        given |= {named(value): self._lying(value, task) for value in task.reads}
        return Completed(
            tuple(self.completed.rules[n] for n in task.numbers),
            tuple(self.completed.carried[n] for n in task.numbers),
            tuple(given[name] for name, _ in task.program.inputs),
            self.completed.resting,
            self.completed.places,
        )

    def _lying(self, value: int, task: Task) -> Layout:
        """How a value lies that another task made."""
        if self.tasks.crosses(value):
            return self.landing(value)
        reader = task.stage, task.kind
        for key in self.tasks.makers(value, reader):
            if (key, value) in self.lies:
                return self.lies[key, value]
        raise AssertionError(f"value {value} is read by {reader} before it is made")

    def _outputs(self, task: Task, last: frozenset[str]) -> dict[str, Layout]:
        """Where a task's outputs must lie; what stays in its stage may lie as it comes."""
        each, whole = by_part(self.states), self.tasks.whole
        usual = unit_outputs(whole, self.axes, each, last=False)
        final = unit_outputs(whole, self.axes, each, last=True)
        found = {}
        for name, _ in task.program.outputs:
            if not name.startswith("value/"):
                found[name] = final[name] if name in last else usual[name]
            elif self.tasks.crosses(value := int(name.removeprefix("value/"))):
                found[name] = self.landing(value)
        return found

    def landing(self, value: int) -> Layout:
        """How a value lies that goes from stage to stage: as it is made, its sums paid for."""
        whole, number = self.tasks.whole, self.tasks.made[value]
        op, rule = whole.ops[number], self.completed.rules[number]
        carried = dict(self.completed.carried[number])
        place = len(op.inputs) + op.results.index(value)
        found: dict[str, Placement] = {}
        for axis in self.axes:
            if axis.name in carried:
                found[axis.name] = placed(rule, place, axis.name, carried[axis.name])
            elif op.base == "meshwright.annotate":
                found[axis.name] = self.completed.places.get(axis.name, {}).get(value)
        kept = {a: p for a, p in found.items() if isinstance(p, Shard)}
        if any(p is not None and not isinstance(p, Shard | Partial) for p in found.values()):
            raise PlanError(
                f"the pipeline would send {op.source or op.name}, which is split in uneven parts "
                "over an axis; cut it elsewhere, by cuts"
            )
        return Layout.of(self.axes, kept)


def open_unit(unit: Program, states: Mapping[str, StateLayouts]) -> Program:
    """A traced micro-batch with fused parameters in parts, as it is placed."""
    return opened(unit, fused_of({name: state.work for name, state in states.items()}))
