"""Running a schedule with sends that no buffer takes: each waits for its receive to be posted.

Of each direction between two ranks, receives are posted in the order of the sends, and no more than
`window` that have not been read. A rank computes, then stands in its send until it is taken:

    window 1, 1F1B    rank 0   0F0 > 0F1 > ...        the second send waits until 1F0 has run
                      rank 1         1F0     1B0 >    its receive of 1F1 is posted, 1B0 waits not
"""

from __future__ import annotations

from dataclasses import dataclass, field

from meshwright.schedule.graph import Graph, Stuck

__all__ = ["least_window", "meet"]

Pair = tuple[int, int]


@dataclass(slots=True)
class _State:
    """How far each rank is, and which rank is woken by what."""

    at: list[int]
    sending: list[bool]
    done: bytearray
    read: dict[Pair, int] = field(default_factory=dict)
    """Of each direction, messages that the receiver has read."""
    on_action: dict[int, list[int]] = field(default_factory=dict)
    on_read: dict[Pair, int] = field(default_factory=dict)
    waits: dict[int, tuple[int, int]] = field(default_factory=dict)


def meet(graph: Graph, window: int) -> list[int] | Stuck:
    """All actions in an order in which they run; or where the ranks get stuck."""
    place = _places(graph)
    state = _State(
        [numbers.start for numbers in graph.ranks],
        [False] * len(graph.ranks),
        bytearray(len(graph.actions)),
    )
    order: list[int] = []
    able = list(range(len(graph.ranks)))
    while able:
        rank = able.pop()
        state.waits.pop(rank, None)
        while state.at[rank] < graph.ranks[rank].stop:
            number = state.at[rank]
            if not state.sending[rank]:
                if not _compute(graph, state, rank, number, able):
                    break
                order.append(number)
            if not _send(graph, state, rank, number, place[number] - window):
                break
            state.sending[rank] = False
            state.at[rank] += 1
            able.extend(state.on_action.pop(number, ()))
    return order if not state.waits else Stuck(state.waits)


def _places(graph: Graph) -> list[int]:
    """Of each action that sends, the place of its message among those of its direction."""
    sent: dict[Pair, int] = {}
    places = [0] * len(graph.actions)
    for number, reader in enumerate(graph.feeds):
        if reader >= 0:
            pair = (graph.home[number], graph.home[reader])
            places[number] = sent.get(pair, 0)
            sent[pair] = places[number] + 1
    return places


def _compute(graph: Graph, state: _State, rank: int, number: int, able: list[int]) -> bool:
    """Run the action if all that it reads has come; what it has read makes room for more."""
    for need in graph.needs[number]:
        if not state.done[need]:
            state.on_action.setdefault(need, []).append(rank)
            state.waits[rank] = (number, need)
            return False
    for need in graph.needs[number]:
        if graph.home[need] != rank:
            pair = (graph.home[need], rank)
            state.read[pair] = state.read.get(pair, 0) + 1
            if pair in state.on_read:
                able.append(state.on_read.pop(pair))
    state.sending[rank] = True
    if graph.feeds[number] < 0:
        state.done[number] = 1
    return True


def _send(graph: Graph, state: _State, rank: int, number: int, must_be_read: int) -> bool:
    """Hand the result over if its receive is posted."""
    reader = graph.feeds[number]
    if reader < 0:
        return True
    pair = (rank, graph.home[reader])
    if state.read.get(pair, 0) <= must_be_read:
        state.on_read[pair] = rank
        state.waits[rank] = (number, reader)
        return False
    state.done[number] = 1
    return True


def least_window(graph: Graph) -> int:
    """The smallest window that runs to the end; the graph must run with all receives posted."""
    low, high = 1, 1
    while isinstance(meet(graph, high), Stuck):
        low, high = high + 1, 2 * high
    while low < high:
        middle = (low + high) // 2
        if isinstance(meet(graph, middle), Stuck):
            low = middle + 1
        else:
            high = middle
    return high
