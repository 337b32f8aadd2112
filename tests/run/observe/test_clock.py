"""Clocks are compared; whatever the network does, the true difference is within the error."""

from __future__ import annotations

from itertools import count

from hypothesis import given
from hypothesis import strategies as st

from meshwright.comm.base import Group
from meshwright.comm.local import run_local
from meshwright.run.observe.clock import Clock, compare_clocks

AHEAD = st.floats(-1e5, 1e5, allow_nan=False)
DELAY = st.floats(0.0, 0.3, allow_nan=False)
"""Seconds; zeros too, as a message that takes no time is what a bound must survive."""


class Time:
    """The true time: each look at any clock takes a while, as computing and messages do."""

    def __init__(self, delays: list[float]) -> None:
        self.delays, self.at, self.looks = delays, 1000.0, count()

    def clock(self, ahead: float, looks: list[float]):
        def now() -> float:
            self.at += self.delays[next(self.looks) % len(self.delays)]
            looks.append(self.at)
            return self.at + ahead

        return now


def compared(
    aheads: list[float], delays: list[float], hosts: list[str]
) -> tuple[list[Clock], list[float]]:
    """What each rank finds, and the seconds that its shortest gather took together with rank 0's.

    There and back, that is.
    """
    time, group = Time(delays), Group.world(len(aheads))
    looks: list[list[float]] = [[] for _ in aheads]
    found = run_local(
        [
            compare_clocks(group, rank, time.clock(ahead, looks[rank]), hosts[rank], rounds=5)
            for rank, ahead in enumerate(aheads)
        ]
    )
    took = [
        [got - sent for sent, got in zip(mine[:-2:2], mine[1:-2:2], strict=True)] for mine in looks
    ]
    trips = [min((a + b for a, b in zip(mine, took[0], strict=True)), default=0.0) for mine in took]
    return found, trips


@given(st.lists(AHEAD, min_size=2, max_size=4), st.lists(DELAY, min_size=1, max_size=11))
def test_the_true_difference_is_within_half_of_the_shortest_round_trip(aheads, delays):
    found, trips = compared(aheads, delays, [f"host {rank}" for rank in range(len(aheads))])
    assert found[0] == Clock()
    rounding = 1e-9  # of float64 at 1e5 seconds
    for ahead, clock, trip in zip(aheads, found, trips, strict=True):
        assert abs(clock.ahead - (ahead - aheads[0])) <= clock.error + rounding
        assert clock.error <= trip / 2 + rounding


def test_one_quick_round_among_slow_ones_is_enough():
    slow, quick = [0.2] * 4, [0.001] * 4  # two ranks look twice each in a round
    found, _ = compared([0.0, 7.0], [*slow, *slow, *quick, *quick, *slow, *slow], ["a", "b"])
    assert abs(found[1].ahead - 7.0) <= found[1].error <= 0.005


def test_ranks_of_one_host_read_one_clock():
    assert compared([0.0, 0.0], [0.1], ["a", "a"])[0] == [Clock(), Clock()]
    found, _ = compared([0.0, 0.0, 3.0], [0.1], ["a", "a", "b"])
    assert found[1] == Clock()
    assert abs(found[2].ahead - 3.0) <= found[2].error
