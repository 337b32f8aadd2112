"""Zero bubble: the backward is split, and the weights' part fills what were bubbles (Qi 2023).

`I` finds the gradient of a stage's inputs, which the stage before waits for; `W` that of its
weights, which nobody waits for. Three ranks, four and six micro-batches, all parts equally long:

ZB-H1: the memory of 1F1B, bubble (P - 1)(F + I - W)

    rank 0  0F0 0F1 0F2   .   . 0I0 0W0 0F3 0I1 0W1 0I2 0W2 0I3 0W3
    rank 1    . 1F0 1F1   . 1I0 1F2 1I1 1W0 1F3 1I2 1W1 1I3 1W2 1W3
    rank 2    .   . 2F0 2I0 2F1 2I1 2F2 2I2 2W0 2F3 2I3 2W1 2W2 2W3

ZB-H2: up to 2P - 1 micro-batches alive, bubble (P - 1)(F + I - 2W)

    rank 0  0F0 0F1 0F2 0F3 0F4 0I0 0W0 0F5 0I1 0W1 0I2 0W2 0I3 0W3 0I4 0W4 0I5 0W5
    rank 1    . 1F0 1F1 1F2 1I0 1F3 1I1 1F4 1I2 1W0 1F5 1I3 1W1 1I4 1W2 1I5 1W3 1W4 1W5
    rank 2    .   . 2F0 2I0 2F1 2I1 2F2 2I2 2F3 2I3 2F4 2I4 2W0 2F5 2I5 2W1 2W2 2W3 2W4 2W5

ZB-V: two stages on each of two ranks, folded; 2P half-sized stages alive, which is 1F1B's memory,
and no bubble when F = I = W

    rank 0  0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0I0 0W0 3F2 3I2 3W2 0I1 0W1 0I2 0W2
    rank 1    . 1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1I1 2I2 1I2 1W1 2W2 1W2

A bubble is what a rank waits between its first action and its last: with these, ranks end a step as
staggered as they began it, so the next one can follow without a gap.
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
