"""Rotated paired rounds: every contestant once a round, each order also backwards."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from benchmarks.harness.crew import Crew, Failed, Timed
from benchmarks.harness.lines import Line, decided
from benchmarks.harness.statistics import FEWEST, enclosing

Times = dict[str, list[float]]


def order(names: Sequence[str], number: int) -> list[str]:
    """Who runs when in round `number`: rotated every second round, backwards in between.

    In each pair of rounds everyone runs before and after everyone else once, so that neither a
    drift nor what the one before left in the caches falls on one of them.
    """
    turn = (number // 2) % len(names)
    rotated = [*names[turn:], *names[:turn]]
    return rotated[::-1] if number % 2 else rotated


def looked_at(n: int) -> bool:
    """Whether it may be decided after n rounds: where one more value may be left outside."""
    return n >= FEWEST and enclosing(n) > enclosing(n - 1)


def play(
    crews: Mapping[str, Crew],
    lines: Sequence[Line],
    steps: int,
    warm: int,
    most: int,
    seconds: float,
    told: Callable[[int, Mapping[str, Timed]], None],
) -> tuple[dict[str, list[Timed]], dict[str, str]]:
    """Rounds until every line is decided, there were `most`, or the time is over.

    Args:
        crews: the contestants, ready.
        lines: what is to be decided.
        steps: timed in a turn.
        warm: untimed before them.
        most: rounds.
        seconds: after which no other round begins, but for the fewest that say anything.
        told: called after each round.

    Returns:
        By contestant one value a round; and the reasons of those that failed, which are left out.
    """
    found: dict[str, list[Timed]] = {name: [] for name in crews}
    failed: dict[str, str] = {}
    began = time.monotonic()
    for number in range(most):
        turn: dict[str, Timed] = {}
        for name in order([n for n in crews if n not in failed], number):
            try:
                turn[name] = crews[name].turn(steps, warm)
            except Failed as reason:
                failed[name] = str(reason)
        for name, timed in turn.items():
            found[name].append(timed)
        told(number, turn)
        times = {n: [t.seconds for t in found[n]] for n in found if n not in failed}
        if looked_at(number + 1) and all(decided(line, times) for line in lines):
            break
        if number + 1 >= FEWEST and time.monotonic() - began > seconds:
            break
    return {name: found[name] for name in crews if name not in failed}, failed


def middle(found: Sequence[Timed]) -> float:
    """Median seconds per step."""
    return statistics.median(timed.seconds for timed in found)
