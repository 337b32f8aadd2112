"""How far each rank's clock is from rank 0's: an interval that holds it for certain, made small.

In a round all ranks gather what their clocks say (`sent`) and look at them again when the gather
ends (`got`). Nobody's gather ends before everybody has sent, so with `ahead` = this clock minus
rank 0's at one moment

    sent - ahead <= got of rank 0        and        sent of rank 0 <= got - ahead

and `ahead` lies in [sent - got of rank 0, got - sent of rank 0], whichever way the messages went
and however long each took. The rounds' intervals are cut with each other; the middle of what is
left is the estimate and half its width, at most half of the shortest round trip, the error
(Marzullo and Owicki 1983; NTP's exchange, RFC 5905 section 8, with the ranks in parallel).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch

from meshwright.comm.base import Group, all_gather, gather_json

__all__ = ["ROUNDS", "Clock", "compare_clocks"]

ROUNDS = 16


@dataclass(frozen=True, slots=True)
class Clock:
    """Seconds that this rank's clock is ahead of rank 0's, and how far that may be off."""

    ahead: float = 0.0
    error: float = 0.0


def compare_clocks(
    group: Group, index: int, now: Callable[[], float], host: str, rounds: int = ROUNDS
) -> Generator[Any, Any, Clock]:
    """Compare this rank's clock with that of the group's first member; an exchange.

    Args:
        group: whose members all take part.
        index: this rank's in it.
        now: its clock, in seconds; no rank's may run backwards.
        host: equal for ranks that read one clock; no rounds are needed where all do.
        rounds: how many to make.
    """
    hosts = yield from gather_json(host, group, "hosts")
    if len(set(hosts)) == 1:
        return Clock()
    low, high = float("-inf"), float("inf")
    shapes = ((2,),) * len(group.ranks)
    before: tuple[float, float, float] | None = None  # sent, got, and sent of rank 0
    got = 0.0
    for _ in range(rounds + 1):  # what rank 0 got in a round is told in the next one
        sent = now()
        mine = torch.tensor([sent, got], dtype=torch.float64)
        first, *_ = yield from all_gather(mine, group, shapes, "clocks")
        if before is not None:
            low = max(low, before[0] - float(first[1]))
            high = min(high, before[1] - before[2])
        got = now()
        before = (sent, got, float(first[0]))
    if hosts[index] == hosts[0]:
        return Clock()
    return Clock((low + high) / 2, (high - low) / 2)
