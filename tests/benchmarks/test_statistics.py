"""Medians, their intervals and verdicts."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.harness.statistics import (
    FEWEST,
    HOLDS,
    MISSES,
    OPEN,
    Estimate,
    enclosing,
    estimate,
    verdict,
)


@pytest.mark.parametrize(("n", "k"), [(5, 0), (6, 1), (8, 1), (9, 2), (12, 3), (17, 5), (20, 6)])
def test_ranks_are_those_of_the_sign_test(n, k):
    assert enclosing(n) == k


@pytest.mark.parametrize("n", range(FEWEST, 60))
def test_ranks_cover_95_percent_and_the_next_ones_do_not(n):
    k = enclosing(n)

    def covered(k):
        return 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n

    assert covered(k) >= 0.95 > covered(k + 1)


def test_the_interval_covers_the_true_median_as_often_as_it_says():
    draw = random.Random(1)
    trials = [estimate([draw.expovariate(1.0) for _ in range(12)]) for _ in range(2000)]
    truth = math.log(2)
    assert sum(t.low <= truth <= t.high for t in trials) / len(trials) > 0.94


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=40))
def test_the_median_lies_in_its_interval(values):
    found = estimate(values)
    assert found.low <= found.median <= found.high
    assert found.median == statistics.median(values)
    assert math.isinf(found.high) == (len(values) < FEWEST)


@pytest.mark.parametrize(
    ("low", "high", "target", "sense", "said"),
    [
        (0.97, 0.99, 0.97, "at least", HOLDS),
        (0.96, 0.98, 0.97, "at least", OPEN),
        (0.94, 0.96, 0.97, "at least", MISSES),
        (1.10, 1.20, 1.20, "at most", HOLDS),
        (1.10, 1.30, 1.20, "at most", OPEN),
        (1.21, 1.30, 1.20, "at most", MISSES),
        (0.99, 1.01, 0.02, "within", HOLDS),
        (0.97, 1.01, 0.02, "within", OPEN),
        (1.03, 1.05, 0.02, "within", MISSES),
        (0.90, 0.97, 0.02, "within", MISSES),
    ],
)
def test_verdicts(low, high, target, sense, said):
    assert verdict(Estimate((low + high) / 2, low, high, 9), target, sense) == said


def test_too_few_rounds_decide_nothing():
    assert verdict(estimate([2.0] * (FEWEST - 1)), 1.0, "at least") == OPEN
    assert verdict(estimate([2.0] * FEWEST), 1.0, "at least") == HOLDS
