"""What each action waits for, with actions as numbers: what checking and timing walk along.

    F of stage s         after F of stage s - 1
    B or I of stage s    after its own F, and B or I of stage s + 1
    W of stage s         after its own I

and every action after the one before it on its rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from meshwright.schedule.action import Action, Schedule

__all__ = ["Graph", "Stuck", "graph_of", "walk"]

_SLOT = {"F": 0, "B": 1, "I": 1, "W": 2}


@dataclass(frozen=True, slots=True)
class Graph:
    """A schedule's actions, numbered rank by rank.

    Attributes:
        actions: by number.
        ranks: of each rank, the numbers of its actions in order.
        home: of each action, its rank.
        needs: of each action, the actions whose results it reads; never more than two.
        feeds: of each action, the action on *another* rank that reads its result, or -1.
    """

    actions: Sequence[Action]
    ranks: Sequence[range]
    home: Sequence[int]
    needs: Sequence[tuple[int, ...]]
    feeds: Sequence[int]


@dataclass(frozen=True, slots=True)
class Stuck:
    """Where ranks stand that can go no further: rank -> its action and what it waits for."""

    waits: dict[int, tuple[int, int]]


def graph_of(schedule: Schedule) -> Graph:
    """The graph of a complete schedule (`check` says what that is)."""
    actions = [action for order in schedule.ranks for action in order]
    home = [rank for rank, order in enumerate(schedule.ranks) for _ in order]
    count = schedule.microbatches
    slots = [-1] * (3 * schedule.stages * count)
    for number, action in enumerate(actions):
        slots[(_SLOT[action.kind] * schedule.stages + action.stage) * count + action.microbatch] = (
            number
        )
    needs = [_needs(action, slots, schedule.stages, count) for action in actions]
    feeds = [-1] * len(actions)
    for number, before in enumerate(needs):
        for source in before:
            if home[source] != home[number]:
                feeds[source] = number
    return Graph(actions, tuple(_ranges(schedule)), home, needs, feeds)


def _needs(action: Action, slots: list[int], stages: int, count: int) -> tuple[int, ...]:
    place = action.stage * count + action.microbatch
    whole = stages * count
    if action.kind == "F":
        return (slots[place - count],) if action.stage else ()
    if action.kind == "W":
        return (slots[whole + place],)
    own = slots[place]
    return (own, slots[whole + place + count]) if action.stage + 1 < stages else (own,)


def _ranges(schedule: Schedule) -> Iterator[range]:
    begin = 0
    for order in schedule.ranks:
        yield range(begin, begin + len(order))
        begin += len(order)


def walk(graph: Graph) -> list[int] | Stuck:
    """All actions in an order in which they can run; or where the ranks get stuck."""
    at = [numbers.start for numbers in graph.ranks]
    done = bytearray(len(graph.actions))
    waiters: dict[int, list[int]] = {}
    order: list[int] = []
    able = list(range(len(at)))
    while able:
        rank = able.pop()
        stop = graph.ranks[rank].stop
        number = at[rank]
        while number < stop:
            missing = next((need for need in graph.needs[number] if not done[need]), -1)
            if missing >= 0:
                waiters.setdefault(missing, []).append(rank)
                break
            done[number] = 1
            order.append(number)
            able.extend(waiters.pop(number, ()))
            number += 1
        at[rank] = number
    if len(order) == len(graph.actions):
        return order
    return Stuck({rank: (at[rank], need) for need, ranks in waiters.items() for rank in ranks})
