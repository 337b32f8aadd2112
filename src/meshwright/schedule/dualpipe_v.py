"""DualPipe-V: forwards of one chunk and backwards of the other in pairs, folded like a V.

Two ranks, four micro-batches, a backward drawn as long as a forward:

    rank 0  0F0 0F1 0F2 3F0 3I0 3W0 3F1 0F3 3B1 3F2 0B0 3B2 3F3 0B1 3B3 0I2 0W2 0I3 0W3
    rank 1    . 1F0 2F0 1F1 2F1 1F2 2B0 2F2 1B0 1F3 2B1 2F3 1B1 2B2 1B2 2I3 1I3 2W3 1W3

In the middle each rank takes a forward and a whole backward at a time, of different chunks, so that
the transfers of one hide behind the computing of the other (DeepSeek-V3, 2024; the folded form of
sail-sg). Backwards are split only where the pipe fills and drains. Peak 2P + 1 half-sized stages.
"""

from __future__ import annotations

from meshwright.schedule.action import Schedule
from meshwright.schedule.placement import folded
from meshwright.schedule.weave import Pattern, chunk, weave

__all__ = ["dualpipe_v"]


def dualpipe_v(ranks: int, microbatches: int) -> Schedule:
    """DeepSeek's order for two chunks on each rank."""
    padded = max(microbatches, 2 * ranks)
    orders = (
        weave(
            _pattern(rank, ranks, padded),
            {"0": chunk(rank, padded), "1": chunk(2 * ranks - 1 - rank, padded)},
        )
        for rank in range(ranks)
    )
    kept = (tuple(a for a in order if a.microbatch < microbatches) for order in orders)
    return Schedule("dualpipe-v", folded(ranks), microbatches, tuple(kept))


def _pattern(rank: int, ranks: int, microbatches: int) -> Pattern:
    after = ranks - 1 - rank
    half, odd = divmod(rank + 1, 2)
    return [
        (2 * after, "F0"),
        (rank + 1, "F0 F1"),
        (after, "I1 W F1"),
        (microbatches - 2 * ranks + rank + 1, "F0 B1 F1 B0"),
        (after, "B1 F1 B0"),
        (half, "B1 B0"),
        (odd, "B1 I0"),
        (half, "I1 I0"),
        (after, "W I0"),
        (rank + 1, "W"),
    ]
