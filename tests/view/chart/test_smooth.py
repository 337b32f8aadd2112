"""Long series made short."""

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.view.chart import smooth
from meshwright.view.chart.smooth import bins, chunks, smoothed

POINTS = st.lists(st.floats(-1e6, 1e6), max_size=300).map(lambda vs: list(enumerate(vs, 1)))


def test_examples() -> None:
    assert doctest.testmod(smooth).failed == 0


@given(st.lists(st.integers(), max_size=200), st.integers(1, 50))
def test_chunks_are_the_items_in_order_and_of_even_length(items: list[int], most: int) -> None:
    runs = chunks(items, most)
    assert [item for run in runs for item in run] == items
    assert len(runs) <= most
    assert max(map(len, runs), default=1) - min(map(len, runs), default=1) <= 1


@given(POINTS, st.integers(1, 40))
def test_bins_keep_the_extremes(points: list[tuple[int, float]], most: int) -> None:
    found = bins(points, most)
    values = [value for _, value in points]
    assert max((b.most for b in found), default=None) == max(values, default=None)
    assert min((b.least for b in found), default=None) == min(values, default=None)


def test_a_slope_is_kept_where_it_is() -> None:
    line = [(step, 2.0 * step) for step in range(1, 1001)]
    course = dict(smoothed(line))
    assert course[500] == pytest.approx(1000.0)


def test_a_spike_is_flattened_and_few_points_are_left_alone() -> None:
    spike = [(step, 100.0 if step == 500 else 0.0) for step in range(1, 1001)]
    assert max(value for _, value in smoothed(spike)) < 6
    assert smoothed(spike[490:505]) == tuple(spike[490:505])
