"""Messages: what ranks of a pipeline send one another, and when it is needed; a pure function.

A task sends what it makes straight to every rank that reads it, once. Messages of an ordered pair
of ranks arrive in the order in which they are sent.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from meshwright.program.stage import Key, Tasks
from meshwright.schedule.action import Action, Schedule

__all__ = ["Sent", "messages"]


@dataclass(frozen=True, slots=True)
class Sent:
    """What `action` sends from one pipeline rank to another, where `needed` reads it first."""

    action: Action
    source: int
    target: int
    values: tuple[int, ...]
    needed: Action

    @property
    def label(self) -> str:
        """`0F3 to rank 1`: alike at both ends, and for all micro-batches of one form."""
        return f"{self.action.stage}{self.action.kind} for {self.needed.stage}{self.needed.kind}"


def messages(
    schedule: Schedule, tasks: Sequence[Tasks], here: int | None = None
) -> tuple[Sent, ...]:
    """Everything that is sent in a step, by sender in the order of its sends.

    Args:
        schedule: of the step.
        tasks: of each micro-batch.
        here: a pipeline rank, where only what it sends and receives is asked for.
    """
    known: dict[tuple[int, frozenset[Key]], Mapping[Key, list[_Parcel]]] = {}
    keys = {k: frozenset(found) for k, found in _keys(schedule).items()}
    place = {action: number for actions in schedule.ranks for number, action in enumerate(actions)}
    found: list[Sent] = []
    for source, actions in enumerate(schedule.ranks):
        for action in actions:
            k = action.microbatch
            form = id(tasks[k]), keys[k]
            if form not in known:
                known[form] = _parcels(schedule, tasks[k], keys[k])
            for parcel in known[form].get((action.stage, action.kind), ()):
                if here is None or here in (source, parcel.target):
                    readers = (Action(stage, kind, k) for stage, kind in parcel.readers)
                    first = min(readers, key=place.__getitem__)
                    found.append(Sent(action, source, parcel.target, parcel.values, first))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class _Parcel:
    """What a task sends to a pipeline rank, and the tasks that read it there."""

    target: int
    values: tuple[int, ...]
    readers: frozenset[Key]


def _keys(schedule: Schedule) -> dict[int, set[Key]]:
    """The tasks that the schedule has of each micro-batch."""
    found: dict[int, set[Key]] = defaultdict(set)
    for actions in schedule.ranks:
        for action in actions:
            found[action.microbatch].add((action.stage, action.kind))
    return found


def _parcels(schedule: Schedule, tasks: Tasks, keys: frozenset[Key]) -> dict[Key, list[_Parcel]]:
    """By task what it sends, of a micro-batch with these tasks."""
    taken: dict[tuple[Key, int], dict[int, set[Key]]] = {}
    for reader in keys:
        target = schedule.placement[reader[0]]
        for value in tasks.task(reader).reads:
            (maker,) = (key for key in tasks.makers(value, reader) if key in keys)
            if schedule.placement[maker[0]] != target:
                taken.setdefault((maker, target), {}).setdefault(value, set()).add(reader)
    found: dict[Key, list[_Parcel]] = {}
    for (maker, target), values in sorted(taken.items()):
        readers = frozenset[Key]().union(*values.values())
        found.setdefault(maker, []).append(_Parcel(target, tuple(sorted(values)), readers))
    return found
