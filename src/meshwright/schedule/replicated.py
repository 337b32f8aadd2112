"""Replicated stages under a flush: replicas of a stage take a step's micro-batches in turn.

Stage 0 on two ranks, stage 1 on one, four micro-batches, a backward drawn as long as a forward:

    rank 0 (stage 0)  0F0   . 0F2 0B0 0B2          takes 0, 2
    rank 1 (stage 0)  0F1   . 0F3   . 0B1 ...      takes 1, 3
    rank 2 (stage 1)    . 1F0 1B0 1F1 1B1 ...

It is 1F1B (PipeDream's 1F1B-RR within a step) whose stages run ahead by as much as keeps the later
stages' ranks busy; each rank does what is its own of its stage's order.
"""

from __future__ import annotations

from collections.abc import Sequence

from meshwright.schedule.action import Action, Schedule
from meshwright.schedule.pipedream import asynchronous_of

__all__ = ["replicated"]


def replicated(replicas: Sequence[int], microbatches: int) -> Schedule:
    """1F1B of stages on so many ranks each; `ranks` of it are stages, whose replicas take turns."""
    pipe = asynchronous_of("pipedream", tuple(replicas))
    orders = []
    for stage in range(len(replicas)):
        ahead = min(pipe.ahead(stage), microbatches)
        order = [Action(stage, "F", k) for k in range(ahead)]
        for k in range(microbatches):
            if k + ahead < microbatches:
                order.append(Action(stage, "F", k + ahead))
            order.append(Action(stage, "B", k))
        orders.append(tuple(order))
    return Schedule("1f1b", tuple(range(len(replicas))), microbatches, tuple(orders))
