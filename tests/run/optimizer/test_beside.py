"""Exchanges side by side."""

from __future__ import annotations

import pytest
import torch

from meshwright.comm.base import Group, Start, Wait, all_reduce
from meshwright.comm.local import LocalWorld
from meshwright.run.optimizer.beside import beside

GROUP = Group.world(2)


def summing(rank, number, rounds, done, log):
    """Sums `number + rank` over both ranks, so many times."""
    total = torch.tensor([float(number + rank)])
    for turn in range(rounds):
        log.append(("asks", number, turn))
        total = yield from all_reduce(total, GROUP)
    done.append((number, float(total)))


def on_both(limit, weights, rounds):
    done, logs = ([], []), ([], [])

    def run(rank):
        each = [
            (weight, summing(rank, n, r, done[rank], logs[rank]))
            for n, (weight, r) in enumerate(zip(weights, rounds, strict=True))
        ]
        yield from beside(each, limit)

    LocalWorld(2).perform([run(0), run(1)])
    assert logs[0] == logs[1]
    assert sorted(done[0]) == sorted(done[1])
    return sorted(done[0]), [(n, turn) for _, n, turn in logs[0]]


def test_each_has_its_own_answers_and_all_end():
    done, _ = on_both(10, (1, 1, 1), (2, 1, 3))
    assert done == [(0, 2.0), (1, 3.0), (2, 20.0)]


def test_as_many_as_weigh_the_limit_are_begun_before_one_goes_on():
    assert on_both(2, (1, 1, 1), (2, 2, 2))[1] == [
        (0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (2, 1),
    ]  # fmt: skip
    assert on_both(1, (1, 1), (2, 2))[1] == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_one_that_weighs_more_than_the_limit_goes_alone():
    assert on_both(2, (1, 5, 1), (2, 2, 1))[1] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]


def test_an_error_is_thrown_in_where_it_was_asked_for():
    seen = []

    def asking():
        try:
            yield from all_reduce(torch.zeros(1), GROUP)
        except OSError:
            seen.append("told")
            raise

    started, waiting = beside([(1, asking())], 1), beside([(1, asking())], 1)
    assert isinstance(next(started), Start)
    with pytest.raises(OSError, match="gone"):
        started.throw(OSError("gone"))
    next(waiting)
    assert isinstance(waiting.send(object()), Wait)
    with pytest.raises(OSError, match="gone"):
        waiting.throw(OSError("gone"))
    assert seen == ["told", "told"]
