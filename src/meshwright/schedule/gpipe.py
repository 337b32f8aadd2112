"""GPipe: all forwards, then all backwards; simple, and every micro-batch is alive at the turn.

Three ranks, four micro-batches, a backward drawn as long as a forward:

    rank 0  0F0 0F1 0F2 0F3   .   .   .   . 0B0 0B1 0B2 0B3
    rank 1    . 1F0 1F1 1F2 1F3   .   . 1B0 1B1 1B2 1B3
    rank 2    .   . 2F0 2F1 2F2 2F3 2B0 2B1 2B2 2B3

With several chunks on a rank (`virtual`), each chunk takes all its micro-batches before the next
one begins: breadth first (Lamy-Poirier 2022). Bubble (P - 1)(F + B), as 1F1B; divided by `virtual`
when chunks loop. Peak: all of them, microbatches x virtual.
"""

from __future__ import annotations

from meshwright.schedule.action import Action, Schedule
from meshwright.schedule.placement import looped

__all__ = ["gpipe"]


def gpipe(ranks: int, microbatches: int, virtual: int = 1) -> Schedule:
    """All forwards, chunk after chunk, then all backwards, chunks reversed."""
    orders = (_order(rank, ranks, microbatches, virtual) for rank in range(ranks))
    return Schedule("gpipe", looped(ranks, virtual), microbatches, tuple(orders))


def _order(rank: int, ranks: int, microbatches: int, virtual: int) -> tuple[Action, ...]:
    stages = range(rank, ranks * virtual, ranks)
    each = range(microbatches)
    forwards = (Action(stage, "F", index) for stage in stages for index in each)
    backwards = (Action(stage, "B", index) for stage in reversed(stages) for index in each)
    return (*forwards, *backwards)
