"""How much of the time that collectives take is spent computing meanwhile, out of a trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from meshwright.view.parts import Part, transfers

__all__ = ["Overlap", "overlap"]


@dataclass(frozen=True, slots=True)
class Overlap:
    """Over all ranks and traced steps, in seconds.

    Attributes:
        total: of the steps.
        waiting: blocked in a Wait or in Agree, or bringing data to a Start.
        under_way: with at least one collective started and not yet awaited.
        hidden: of that, computing.
    """

    total: float
    waiting: float
    under_way: float
    hidden: float


def overlap(parts: Sequence[Part]) -> Overlap:
    """The sums."""
    total = waiting = under_way = hidden = 0.0
    for part in parts:
        for step in part.steps:
            own = [piece for piece in part.slices if piece.step == step]
            total += own[-1].ended - own[0].began
        kinds = ("Start", "Send", "Recv", "Wait", "Agree")
        waiting += sum(p.ended - p.began for p in part.slices if p.kind in kinds)
        spans = _union(part)
        under_way += sum(ended - began for began, ended in spans)
        runs = [(p.began, p.ended) for p in part.slices if p.computes]
        hidden += _shared(runs, spans)
    return Overlap(total, waiting, under_way, hidden)


Span = tuple[float, float]


def _union(part: Part) -> list[Span]:
    """When at least one collective is under way, as spans that do not touch, in order."""
    found: list[Span] = []
    # A receive is posted ahead of what is sent: the message is not under way all the while.
    whole = ((t.begun, t.awaited) for t in transfers(part))
    ends = [(a.began, b.ended) for a, b in whole if a and b and a.kind != "Recv"]
    for began, ended in sorted(ends):
        if found and began <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], ended))
        else:
            found.append((began, ended))
    return found


def _shared(one: Sequence[Span], other: Sequence[Span]) -> float:
    """Seconds in both; either has spans that do not overlap each other, in order."""
    edges = sorted(
        [(at, change, 0) for began, ended in one for at, change in ((began, 1), (ended, -1))]
        + [(at, 0, change) for began, ended in other for at, change in ((began, 1), (ended, -1))]
    )
    shared, inside, within = 0.0, 0, 0
    for (at, a, b), (following, _, _) in pairwise([*edges, (0.0, 0, 0)]):
        inside, within = inside + a, within + b
        if inside and within:
            shared += following - at
    return shared
