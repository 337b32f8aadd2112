"""Zero bubble: the backward is split, and the weights' part fills what were bubbles (Qi 2023).

`I` finds the gradient of a stage's inputs, which the stage before waits for; `W` that of its
weights, which nobody waits for.
"""

from __future__ import annotations

from meshwright.schedule.action import Schedule
from meshwright.schedule.placement import folded, looped
from meshwright.schedule.weave import Pattern, chunk, weave

__all__ = ["zb_h1", "zb_h2", "zb_v"]


def zb_h1(ranks: int, microbatches: int) -> Schedule:
    """As many forwards ahead as 1F1B; rank r puts off its weight parts by r micro-batches."""
    return _straight("zb-h1", ranks, microbatches, 1)


def zb_h2(ranks: int, microbatches: int) -> Schedule:
    """Twice as many forwards ahead, so that no rank waits for its first backward."""
    return _straight("zb-h2", ranks, microbatches, 2)


def _straight(name: str, ranks: int, microbatches: int, depth: int) -> Schedule:
    orders = (
        weave(
            [
                (depth * (ranks - 1 - rank), "F"),
                (depth * rank, "F I"),
                (microbatches, "F I W"),
                (depth * rank, "W"),
            ],
            {"": chunk(rank, microbatches)},
        )
        for rank in range(ranks)
    )
    return Schedule(name, looped(ranks), microbatches, tuple(orders))


def zb_v(ranks: int, microbatches: int) -> Schedule:
    """Two chunks on each rank, folded: no bubble at equal times, with the memory of 1F1B."""
    padded = max(microbatches, 2 * ranks - 1)
    orders = (
        weave(
            _v(rank, ranks, padded),
            {"0": chunk(rank, padded), "1": chunk(2 * ranks - 1 - rank, padded)},
        )
        for rank in range(ranks)
    )
    # With fewer micro-batches the order is that of the least full schedule, the rest left out:
    # an order of whole micro-batches stays legal without some of them.
    kept = (tuple(a for a in order if a.microbatch < microbatches) for order in orders)
    return Schedule("zb-v", folded(ranks), microbatches, tuple(kept))


def _v(rank: int, ranks: int, microbatches: int) -> Pattern:
    above = ranks - rank
    return [
        (2 * above - 1, "F0"),
        (rank, "F1 F0"),
        (above, "F1 I1 W1"),
        (microbatches - ranks, "F0 I0 W0 F1 I1 W1"),
        (rank, "I0 I1"),
        (above, "I0 W0"),
        (microbatches, "W1"),
        (microbatches, "W0"),
    ]
