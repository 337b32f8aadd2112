"""Names that differ in numbers only, as one."""

from __future__ import annotations

import doctest

from hypothesis import given
from hypothesis import strategies as st

from meshwright.program import fold
from meshwright.program.fold import folded, folded_name, pattern_of


def test_examples():
    assert doctest.testmod(fold).failed == 0


def test_a_name_alone_stays_as_it_is():
    assert folded(["blocks.3.up"]) == "blocks.3.up"


def test_a_star_stands_for_all_there_are_and_a_range_for_some():
    names = [f"blocks.{k}.up" for k in range(6)]
    assert folded(names, names) == "blocks.*.up"
    assert folded(names[1:], names) == "blocks.1–5.up"
    assert folded([names[0], names[2]], names) == "blocks.{0,2}.up"


def test_a_range_never_stands_for_names_that_are_not_there():
    assert folded_name([("a", "0", "b", "0"), ("a", "1", "b", "1")]) == "a.*.b.*"
    assert folded_name([("a", "0", "b", "0"), ("a", "0", "b", "1")]) == "a.0.b.0–1"
    assert folded_name([()]) == "(the model itself)"


@given(st.lists(st.sampled_from(["a", "b", "1", "23"]), min_size=1, max_size=5))
def test_a_pattern_leaves_numbers_open_and_nothing_else(words):
    pattern = pattern_of(".".join(words))
    pairs = list(zip(pattern.split("."), words, strict=True))
    assert all(left == ("*" if right.isdecimal() else right) for left, right in pairs)
    assert pattern_of(pattern) == pattern
