"""Times that no schedule of a problem can beat.

step >= head + all work of a rank         head: when the first forward can reach the rank
     >= head + F and I of a stage + tail  tail: from its last I back to stage 0, and its W
     >= head + m x lifetimes / cap        memory is taken from F until W, so far round at least
"""

from __future__ import annotations

import math
from itertools import accumulate

from meshwright.schedule.problem import Problem

__all__ = ["bound", "period"]


def bound(problem: Problem) -> float:
    """The least that a step can take."""
    count, heads, tails = problem.microbatches, _heads(problem), _tails(problem)
    last = problem.back(0) - problem.to_inputs(0)
    chains = (
        heads[s] + count * (problem.seconds.forward[s] + problem.to_inputs(s)) + tails[s] + last
        for s in range(len(problem.placement))
    )
    whole = (
        min(heads[stage] for stage in problem.stages_of(rank)) + count * _each(problem, rank)
        for rank in range(problem.ranks)
    )
    return max(*chains, *whole)


def period(problem: Problem) -> float:
    """The least between micro-batches, in the long run."""
    return max(_each(problem, rank) for rank in range(problem.ranks))


def _each(problem: Problem, rank: int) -> float:
    """What one micro-batch costs the rank: its work, or its share of the memory's time."""
    mine = problem.stages_of(rank)
    work = sum(problem.seconds.forward[stage] + problem.back(stage) for stage in mine)
    taken = sum(
        problem.held(stage) * _life(problem, stage) + problem.owed(stage) * _after(problem, stage)
        for stage in mine
    )
    return max(work, taken / _usable(problem, rank)) if taken else work


def _heads(problem: Problem) -> list[float]:
    """Of each stage, when its first forward can begin."""
    stages = range(len(problem.placement) - 1)
    steps = (problem.seconds.forward[stage] + problem.hop(stage) for stage in stages)
    return list(accumulate(steps, initial=0.0))


def _tails(problem: Problem) -> list[float]:
    """Of each stage, the least from the end of an `I` until that of stage 0."""
    stages = range(len(problem.placement) - 1)
    steps = (problem.to_inputs(stage) + problem.hop(stage) for stage in stages)
    return list(accumulate(steps, initial=0.0))


def _life(problem: Problem, stage: int) -> float:
    """The least from the begin of a stage's forward until its inputs' gradient is there."""
    heads, tails = _heads(problem), _tails(problem)
    turn = problem.seconds.forward[-1] + problem.to_inputs(len(problem.placement) - 1)
    return heads[-1] - heads[stage] + turn + tails[-1] - tails[stage]


def _after(problem: Problem, stage: int) -> float:
    """The least that a weight part holds memory by itself."""
    return 0.0 if problem.seconds.backward else problem.seconds.weights[stage]


def _usable(problem: Problem, rank: int) -> float:
    """The cap, or what of it equal pieces can fill."""
    cap, mine = problem.cap(rank), problem.stages_of(rank)
    sizes = {size for stage in mine for size in (problem.held(stage), problem.owed(stage))}
    if len(sizes) > 1 or math.isinf(cap):
        return cap
    size = sizes.pop()
    return math.floor(cap / size * (1 + 1e-9)) * size
