"""DualPipe-V: forwards of one chunk and backwards of the other in pairs, folded like a V.

TABLE
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
