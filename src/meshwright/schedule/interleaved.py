"""Interleaved 1F1B: several small chunks on each rank, so the bubble is divided by their number.

Two ranks, two chunks on each, four micro-batches, a backward drawn as long as a forward:

    rank 0  0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1   . 2B2   . 2B3 0B2 0B3
    rank 1    . 1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3

Micro-batches go in groups of P: a group passes chunk after chunk, depth first (Megatron-LM,
Narayanan et al. 2021). When m does not divide by P, groups are made larger, as even as can be, and
never smaller than P unless m is: a short group would let the ranks behind it run dry. Peak on rank
0: 2(P - 1) + (v - 1)P + 1; bubble (P - 1)(F + B)/v.
"""

from __future__ import annotations

from meshwright.errors import PlanError
from meshwright.schedule.action import Schedule
from meshwright.schedule.placement import looped
from meshwright.schedule.weave import Lane, Unit, weave

__all__ = ["interleaved"]


def interleaved(ranks: int, microbatches: int, virtual: int) -> Schedule:
    """Megatron-LM's order; `virtual` chunks on each rank.

    Raises:
        PlanError: there is one chunk only.
    """
    if virtual < 2:
        raise PlanError(
            f"schedule interleaved has virtual={virtual}, but it is about several stages on each"
            " rank; give virtual=2 or more, or take schedule=1f1b"
        )
    groups = _groups(ranks, microbatches)
    orders = (
        weave(
            [
                ((virtual - 1) * groups[0] + 2 * (ranks - 1 - rank), "F"),
                (microbatches * virtual, "F B"),
            ],
            {"": _lane(range(rank, ranks * virtual, ranks), groups)},
        )
        for rank in range(ranks)
    )
    return Schedule("interleaved", looped(ranks, virtual), microbatches, tuple(orders))


def _groups(ranks: int, microbatches: int) -> list[int]:
    """Sizes of the groups, larger ones first.

    >>> _groups(4, 10), _groups(4, 11), _groups(4, 3)
    ([5, 5], [6, 5], [3])
    """
    count = max(1, microbatches // ranks)
    size, more = divmod(microbatches, count)
    return [size + (index < more) for index in range(count)]


def _lane(stages: range, groups: list[int]) -> Lane:
    return Lane(_through(stages, groups), _through(stages[::-1], groups))


def _through(stages: range, groups: list[int]) -> list[Unit]:
    """Every group through all stages before the next group."""
    begins = [sum(groups[:index]) for index in range(len(groups))]
    return [
        (stage, begin + index)
        for begin, size in zip(begins, groups, strict=True)
        for stage in stages
        for index in range(size)
    ]
