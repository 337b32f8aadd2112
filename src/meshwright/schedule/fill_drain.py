"""Fill and drain: forwards only, for inference and evaluation.

Three ranks, four micro-batches:

    rank 0  0F0 0F1 0F2 0F3
    rank 1    . 1F0 1F1 1F2 1F3
    rank 2    .   . 2F0 2F1 2F2 2F3

Nothing is kept for a backward, so nothing stays alive but what is on its way.
"""

from __future__ import annotations

from meshwright.schedule.action import Action, Schedule
from meshwright.schedule.placement import looped

__all__ = ["fill_drain"]


def fill_drain(ranks: int, microbatches: int, virtual: int = 1) -> Schedule:
    """All forwards, chunk after chunk."""
    orders = (
        tuple(
            Action(stage, "F", index)
            for stage in range(rank, ranks * virtual, ranks)
            for index in range(microbatches)
        )
        for rank in range(ranks)
    )
    return Schedule("fill-drain", looped(ranks, virtual), microbatches, tuple(orders))
