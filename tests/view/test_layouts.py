"""Which part of the parameters a rank holds."""

import doctest

from hypothesis import given
from hypothesis import strategies as st

from meshwright.view import layouts
from meshwright.view.layouts import KINDS, held, rank_names, shards
from meshwright.view.runfile import parse_setup
from tests.view.runs import run_record


def test_examples() -> None:
    assert doctest.testmod(layouts).failed == 0


@given(st.integers(2, 9), st.integers(0, 3))
def test_ranks_hold_all_of_it_together_and_sharded_state_once(ranks: int, zero: int) -> None:
    setup = parse_setup(run_record(ranks, zero, depth=1))
    for kind, sharded in zip(KINDS, (zero >= 3, zero >= 2, zero >= 1), strict=True):
        pieces = [p for rank in setup.ranks for p in held(setup.parameters, kind, rank, setup.axes)]
        length = sum(stop - start for start, stop in pieces)
        assert abs(length - (1 if sharded else ranks)) < 1e-9
        assert abs(min(start for start, _ in pieces)) < 1e-9
        assert abs(max(stop for _, stop in pieces) - 1) < 1e-9


def test_parts_are_told_by_what_is_split_and_what_is_whole() -> None:
    layout = "partial(sum) over data, fused(0: 0:32 sharded in (1, n, 16); 32:48 whole) over tensor"
    assert layouts.placements(layout) == (("partial", "sum", "data"), ("fused", "0", "tensor"))
    assert layouts.dims_of((48, 32), layout) == ("32/tensor+16", "32")
    assert shards(layout, [("data", 2), ("tensor", 2)]) == 1


def test_two_axes_multiply() -> None:
    axes = [("data", 2), ("tensor", 4)]
    assert shards("sharded(0) over tensor, sharded(1) over data", axes) == 8
    assert shards("sharded(0, outer=3, unit=64) over tensor", axes) == 4
    assert shards("partial(sum) over data", axes) == 1
    assert shards("none", axes) == 0


def test_ranks_are_named_in_ranges() -> None:
    assert rank_names([3, 1, 2, 7, 9, 8]) == "ranks 1–3, 7–9"
