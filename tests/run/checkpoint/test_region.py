"""Boxes against brute force over every index."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from meshwright.run.checkpoint.region import Region, intersect, overlap, whole


def indices(region):
    return set(product(*(range(a, b) for a, b in zip(region.start, region.stop, strict=True))))


@st.composite
def boxes(draw, dims, smallest=0):
    start = draw(st.tuples(*[st.integers(0, 5)] * dims))
    shape = draw(st.tuples(*[st.integers(smallest, 4)] * dims))
    return Region(start, shape)


@given(st.integers(0, 3).flatmap(lambda dims: st.tuples(boxes(dims), boxes(dims))))
def test_intersection_is_the_common_indices(pair):
    one, two = pair
    shared = intersect(one, two)
    assert (indices(shared) if shared else set()) == indices(one) & indices(two)
    assert shared is None or len(indices(shared)) == shared.volume


@given(st.integers(0, 3).flatmap(lambda dims: st.lists(boxes(dims, smallest=1), max_size=8)))
def test_overlap_finds_a_pair_exactly_when_there_is_one(regions):
    brute = any(indices(a) & indices(b) for i, a in enumerate(regions) for b in regions[i + 1 :])
    pair = overlap(regions)
    assert (pair is not None) == brute
    if pair:
        assert indices(pair[0]) & indices(pair[1])


@given(
    st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=4), min_size=1, max_size=3),
    st.randoms(use_true_random=False),
)
def test_a_grid_with_one_box_grown_overlaps(parts, random):
    cuts = [[sum(sizes[:i]) for i in range(len(sizes))] for sizes in parts]
    grid = [
        Region(tuple(start), tuple(shape))
        for start, shape in zip(product(*cuts), product(*parts), strict=True)
    ]
    random.shuffle(grid)
    assert overlap(grid) is None
    assume(len(grid) > 1)
    shape = tuple(sum(sizes) for sizes in parts)
    assert sum(box.volume for box in grid) == whole(shape).volume
    assert overlap([whole(shape), *grid]) is not None


def test_four_boxes_round_a_hole_cannot_be_cut_apart_and_do_not_overlap():
    pinwheel = [
        Region((0, 0), (1, 2)),
        Region((0, 2), (2, 1)),
        Region((2, 1), (1, 2)),
        Region((1, 0), (2, 1)),
        Region((1, 1), (1, 1)),
    ]
    assert overlap(pinwheel) is None
    assert overlap([*pinwheel, Region((1, 1), (1, 1))]) is not None


def test_a_hundred_thousand_pieces_are_checked_in_seconds():
    grid = [Region((i, 2 * j), (1, 2)) for i in range(300) for j in range(300)]
    assert overlap(grid) is None


@pytest.mark.parametrize("kind", ["same", "spiral"])
def test_hostile_sets_are_refused_rather_than_compared_pair_by_pair(kind):
    if kind == "same":
        regions = [Region((0, i), (1, 2)) for i in range(50_000)]
    else:  # each straight cut takes off one box only
        regions, lo, hi = [], 0, 10_000
        while hi - lo > 1:
            regions.append(Region((lo, lo), (1, hi - lo)))
            regions.append(Region((lo + 1, lo), (hi - lo - 1, 1)))
            lo += 1
    with pytest.raises(ValueError, match="overlap or interlock"):
        overlap(regions)


@pytest.mark.parametrize(
    ("start", "shape", "inside"),
    [
        ((0, 0), (2, 3), True),
        ((1, 0), (1, 3), True),
        ((1, 0), (2, 3), False),
        ((-1, 0), (1, 1), False),
        ((0,), (2,), False),
        ((2, 3), (0, 0), True),
        ((0, 0), (-1, 1), False),
    ],
)
def test_inside(start, shape, inside):
    assert Region(start, shape).inside((2, 3)) is inside


def test_slices_are_relative_to_an_origin():
    assert Region((4, 2), (1, 3)).slices((3, 2)) == (slice(1, 2), slice(0, 3))
