"""Order of turns, and rounds that end when there is nothing left to decide."""

from __future__ import annotations

import itertools

import pytest

from benchmarks.harness.crew import Failed, Timed
from benchmarks.harness.lines import Line, judged, ratios
from benchmarks.harness.rounds import looked_at, order, play
from benchmarks.harness.statistics import FEWEST, HOLDS

NAMES = list("abcde")


def test_everyone_runs_once_a_round():
    for number in range(20):
        assert sorted(order(NAMES, number)) == NAMES


def test_in_a_pair_of_rounds_everyone_is_before_everyone_else_once():
    for number in range(0, 10, 2):
        first, second = order(NAMES, number), order(NAMES, number + 1)
        for a, b in itertools.combinations(NAMES, 2):
            assert (first.index(a) < first.index(b)) != (second.index(a) < second.index(b))


def test_everyone_is_first_and_last_as_often():
    rounds = [order(NAMES, number) for number in range(2 * len(NAMES))]
    assert sorted(r[0] for r in rounds) == sorted(r[-1] for r in rounds) == sorted(NAMES * 2)


def test_ratios_are_of_speeds_or_of_times_within_a_round():
    times = {"ours": [1.0, 2.0], "a": [2.0, 2.0], "b": [8.0, 2.0]}
    assert ratios(Line("", "", "ours", ("a",), 1.0), times) == [2.0, 1.0]
    assert ratios(Line("", "", "ours", ("a", "b"), 1.0), times) == pytest.approx([4.0, 1.0])
    assert ratios(Line("", "", "ours", ("a",), 1.0, "at most"), times) == [0.5, 1.0]


class Scripted:
    """A crew whose times are known."""

    def __init__(self, seconds, fails_at=None):
        self.seconds, self.fails_at, self.turns = seconds, fails_at, 0

    def turn(self, steps, warm):
        self.turns += 1
        if self.turns == self.fails_at:
            raise Failed("it broke")
        return Timed(self.seconds, 0.0, 0, ())


class Swinging(Scripted):
    """Now faster, now slower than 1.25."""

    def turn(self, steps, warm):
        self.seconds = 2.5 - self.seconds
        return super().turn(steps, warm)


def played(crews, lines, most=20, seconds=60.0):
    return play(crews, lines, 1, 1, most, seconds, lambda number, turn: None)


def test_rounds_end_when_every_line_is_decided():
    crews = {"ours": Scripted(1.0), "peer": Scripted(1.5)}
    line = Line("", "", "ours", ("peer",), 1.0)
    found, failed = played(crews, [line])
    assert (len(found["ours"]), len(found["peer"]), failed) == (6, 6, {})
    assert judged(line, {n: [t.seconds for t in found[n]] for n in found})[1] == HOLDS


def test_rounds_end_at_the_most_where_a_line_stays_open():
    found, _ = played(
        {"ours": Scripted(1.0), "peer": Swinging(0.5)}, [Line("", "", "ours", ("peer",), 1.0)], 10
    )
    assert len(found["ours"]) == 10


def test_rounds_end_when_the_time_is_over_but_not_before_they_say_something():
    crews = {"ours": Scripted(1.0), "peer": Swinging(0.5)}
    found, _ = played(crews, [Line("", "", "ours", ("peer",), 1.0)], seconds=0.0)
    assert len(found["ours"]) == FEWEST


def test_a_contestant_that_fails_is_left_out_with_its_reason():
    crews = {"ours": Scripted(1.0), "peer": Scripted(1.5), "bad": Scripted(1.0, fails_at=3)}
    lines = [Line("", "", "ours", ("peer",), 1.0), Line("", "", "ours", ("bad",), 1.0)]
    found, failed = played(crews, lines)
    assert failed == {"bad": "it broke"}
    assert {name: len(times) for name, times in found.items()} == {"ours": 6, "peer": 6}
    assert crews["bad"].turns == 3


def test_it_is_looked_at_only_where_the_interval_narrows():
    assert [n for n in range(30) if looked_at(n)] == [6, 9, 12, 15, 17, 20, 23, 25, 28]
