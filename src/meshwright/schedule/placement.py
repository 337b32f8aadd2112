"""Which pipeline rank holds which stage: in a loop, or folded like a V.

    three ranks, two stages on each     rank 0   rank 1   rank 2
    looped                              0, 3     1, 4     2, 5
    folded                              0, 5     1, 4     2, 3

Looped, a micro-batch goes round the ranks once per chunk. Folded, it comes back the way it went,
so that the first and the last stage share a rank and the turn at the bottom costs no transfer.
"""

from __future__ import annotations

__all__ = ["folded", "looped"]


def looped(ranks: int, virtual: int = 1) -> tuple[int, ...]:
    """Stage s on rank s mod `ranks`.

    >>> looped(3, 2)
    (0, 1, 2, 0, 1, 2)
    """
    return tuple(range(ranks)) * virtual


def folded(ranks: int) -> tuple[int, ...]:
    """Two stages on each rank: the first half goes down, the second half comes back up.

    >>> folded(3)
    (0, 1, 2, 2, 1, 0)
    """
    return (*range(ranks), *reversed(range(ranks)))
