"""A line of the table: whose times are compared with whose, and what ratio is asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.harness.statistics import OPEN, Estimate, Sense, estimate, verdict

CONTROL = ("copies A", "copies B")


@dataclass(frozen=True, slots=True)
class Line:
    """A comparison inside one group.

    Attributes:
        key: its name in notes.toml and in the raw numbers.
        what: for the reader.
        ours: a contestant.
        others: contestants; with more than one, the geometric mean of their times.
        target: of the ratio.
        sense: `at least`: the ratio is of speeds, ours over theirs, and 1 is even. `at most`: it is
            of times, ours over theirs. `within`: of speeds, and may differ from 1 by the target.
        ideal: the most that the ratio of speeds can be, of which it is a share.
    """

    key: str
    what: str
    ours: str
    others: tuple[str, ...]
    target: float
    sense: Sense = "at least"
    ideal: float = 1.0


def ratios(line: Line, times: Mapping[str, Sequence[float]]) -> list[float]:
    """Of each round."""
    others = [math.prod(t) ** (1 / len(t)) for t in zip(*map(times.get, line.others), strict=True)]
    speeds = [b / a / line.ideal for a, b in zip(times[line.ours], others, strict=True)]
    return [1 / ratio for ratio in speeds] if line.sense == "at most" else speeds


def judged(line: Line, times: Mapping[str, Sequence[float]]) -> tuple[Estimate, str]:
    """The ratio of a line and its verdict."""
    found = estimate(ratios(line, times))
    return found, verdict(found, line.target, line.sense)


def decided(line: Line, times: Mapping[str, Sequence[float]]) -> bool:
    """Whether more rounds are of no use to a line; one whose contestant failed wants none."""
    if any(name not in times for name in (line.ours, *line.others)):
        return True
    return judged(line, times)[1] != OPEN
