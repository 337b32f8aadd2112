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


def messages(schedule: Schedule, tasks: Sequence[Tasks]) -> tuple[Sent, ...]:
    """Everything that is sent in a step, by sender in the order of its sends.

    Args:
        schedule: of the step.
        tasks: of each micro-batch.
    """
    known: dict[tuple[int, frozenset[Key]], Mapping[Key, dict[int, set[Key]]]] = {}
    keys = _keys(schedule)
    place = {action: number for actions in schedule.ranks for number, action in enumerate(actions)}
    found: list[Sent] = []
    for source, actions in enumerate(schedule.ranks):
        for action in actions:
            k = action.microbatch
            mine = frozenset(keys[k])
            if (id(tasks[k]), mine) not in known:
                known[id(tasks[k]), mine] = _taken(tasks[k], mine)
            given = known[id(tasks[k]), mine][action.stage, action.kind]
            for target in range(len(schedule.ranks)):
                if target != source:
                    found += _sent(schedule, action, (source, target), given, place)
    return tuple(found)


def _keys(schedule: Schedule) -> dict[int, set[Key]]:
    """The tasks that the schedule has of each micro-batch."""
    found: dict[int, set[Key]] = defaultdict(set)
    for actions in schedule.ranks:
        for action in actions:
            found[action.microbatch].add((action.stage, action.kind))
    return found


def _taken(tasks: Tasks, keys: frozenset[Key]) -> dict[Key, dict[int, set[Key]]]:
    """By task and value that it gives, the tasks that take it."""
    found: dict[Key, dict[int, set[Key]]] = {key: {} for key in keys}
    for reader in keys:
        for value in tasks.task(reader).reads:
            (maker,) = (key for key in tasks.makers(value, reader) if key in keys)
            found[maker].setdefault(value, set()).add(reader)
    return found


def _sent(
    schedule: Schedule,
    action: Action,
    way: tuple[int, int],
    given: Mapping[int, set[Key]],
    place: Mapping[Action, int],
) -> list[Sent]:
    """The message of an action to a rank, if it sends it any."""
    source, target = way
    readers: set[Action] = set()
    values = []
    for value, keys in given.items():
        there = {
            Action(stage, kind, action.microbatch)
            for stage, kind in keys
            if schedule.placement[stage] == target
        }
        if there:
            values.append(value)
            readers |= there
    if not values:
        return []
    first = min(readers, key=place.__getitem__)
    return [Sent(action, source, target, tuple(sorted(values)), first)]
