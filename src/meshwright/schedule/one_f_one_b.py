"""1F1B with a flush: as soon as a backward can run, one forward and one backward in turn.

Three ranks, four micro-batches, a backward drawn as long as a forward:

    rank 0  0F0 0F1 0F2   .   . 0B0 0F3 0B1   . 0B2   . 0B3
    rank 1    . 1F0 1F1   . 1B0 1F2 1B1 1F3 1B2   . 1B3
    rank 2    .   . 2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3

The bubble is GPipe's, (P - 1)(F + B), but rank r holds min(m, P - r) micro-batches at most, since
every backward frees what the next forward takes (PipeDream-Flush; Narayanan et al. 2021).
"""

from __future__ import annotations

from meshwright.schedule.action import Schedule
from meshwright.schedule.placement import looped
from meshwright.schedule.weave import chunk, weave

__all__ = ["one_f_one_b"]


def one_f_one_b(ranks: int, microbatches: int) -> Schedule:
    """Warm up until the first backward comes back, then alternate, then drain."""
    orders = (
        weave(
            [(ranks - 1 - rank, "F"), (microbatches, "F B")],
            {"": chunk(rank, microbatches)},
        )
        for rank in range(ranks)
    )
    return Schedule("1f1b", looped(ranks), microbatches, tuple(orders))
