"""Blocks are those whose largest is least, and the most even of these."""

from __future__ import annotations

import math
import random
from itertools import combinations

import pytest

from meshwright.errors import PlanError
from meshwright.predict.blocks import blocks


def sizes(costs, begins):
    return [sum(costs[a:b]) for a, b in zip(begins, (*begins[1:], len(costs)), strict=True)]


def every(costs, count):
    return [(0, *cuts) for cuts in combinations(range(1, len(costs)), count - 1)]


@pytest.mark.parametrize("first", range(0, 2000, 500))
def test_blocks_equal_brute_force(first):
    for seed in range(first, first + 500):
        rng = random.Random(seed)
        costs = [rng.choice((0, 1, 2, 3, 7, 20)) for _ in range(rng.randint(1, 9))]
        count = rng.randint(1, len(costs))
        found = blocks(costs, count)
        assert found in every(costs, count)
        rank = [
            (max(sizes(costs, begins)), sum(size * size for size in sizes(costs, begins)))
            for begins in (found, *every(costs, count))
        ]
        assert rank[0] == min(rank), (seed, costs, count)


@pytest.mark.parametrize(
    ("costs", "begins"),
    [
        ([1, 2, 3, 4, 5, 6], (0, 4)),
        ([1, 1, 1, 1, 1, 1], (0, 2, 4)),
        ([0, 0, 0, 9], (0, 1, 2)),
        ([9, 0, 0, 0], (0, 1, 2)),
        ([7], (0,)),
        ([0.1] * 9, (0, 3, 6)),
    ],
)
def test_edges(costs, begins):
    found = blocks(costs, len(begins))
    assert max(sizes(costs, found)) == pytest.approx(max(sizes(costs, begins)))
    assert len(set(found)) == len(begins)


def test_thousands_of_layers():
    rng = random.Random(0)
    costs = [rng.random() for _ in range(2000)]
    largest = max(sizes(costs, blocks(costs, 16)))
    assert sum(costs) / 16 <= largest <= sum(costs) / 16 + max(costs)


@pytest.mark.parametrize("count", [0, 4, -1])
def test_counts_that_cannot_be(count):
    with pytest.raises(PlanError, match=rf"3 layers cannot be cut into {count} blocks.*1 and 3"):
        blocks([1, 2, 3], count)


@pytest.mark.parametrize("cost", [-1.0, math.nan, math.inf])
def test_costs_that_are_none(cost):
    with pytest.raises(PlanError, match=r"layer 1 costs .*measure it again"):
        blocks([1.0, cost], 1)
