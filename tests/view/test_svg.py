"""The pieces of pictures."""

import doctest
import itertools
from xml.etree import ElementTree as ET

from hypothesis import given
from hypothesis import strategies as st
from markupsafe import Markup

from meshwright.view import svg
from meshwright.view.svg import Scale, el, picture, round_ticks

# XML has no place at all for most control characters.
TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="\ufffe\uffff"))


def test_examples() -> None:
    assert doctest.testmod(svg).failed == 0


@given(TEXT, TEXT)
def test_any_text_comes_back_and_nothing_of_it_is_markup(text: str, label: str) -> None:
    drawn = ET.fromstring(picture(10, 10, label, el("text", text, class_=label)))
    assert [child.text or "" for child in drawn] == [text]
    assert drawn.attrib["aria-label"] == label


def test_markup_is_not_escaped_twice() -> None:
    assert el("g", el("b", "<")) == Markup("<g><b>&lt;</b></g>")


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.integers(2, 12))
def test_ticks_are_within_even_and_about_as_many(low: float, span: float, about: int) -> None:
    ticks = round_ticks(low, low + span, about)
    slack = 1e-6 * (span + abs(low))
    assert all(low - slack <= tick <= low + span + slack for tick in ticks)
    gaps = {round((b - a) / span, 6) for a, b in itertools.pairwise(ticks)}
    assert len(gaps) <= 1 or max(gaps) - min(gaps) < 1e-4
    assert about / 2.6 - 1 <= len(ticks) <= about * 2 + 2


def test_an_empty_range_has_its_middle() -> None:
    assert Scale(3, 3, 0, 10)(3) == 5
    assert round_ticks(3, 3, 5) == (3,)
