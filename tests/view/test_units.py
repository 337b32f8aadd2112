"""Numbers as people read them."""

import doctest
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.view import units
from meshwright.view.units import bytes_text, error_text, percent_text, seconds_text, value_text

FACTORS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "PiB": 2**50}


def test_examples() -> None:
    assert doctest.testmod(units).failed == 0


@given(st.integers(0, 2**59))
def test_bytes_read_back_within_their_digits(size: int) -> None:
    number, unit = bytes_text(size).replace(",", "").split(" ")
    assert float(number) * FACTORS[unit] == pytest.approx(size, rel=0.051, abs=0.5)


@pytest.mark.parametrize(("size", "text"), [(1023, "1023 B"), (2**20 - 1, "1.0 MiB"), (0, "0 B")])
def test_bytes_at_the_edges(size: int, text: str) -> None:
    assert bytes_text(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (3e-7, "0.30 µs"),
        (0.99996, "1.00 s"),
        (59.96, "1 min 00 s"),
        (3600, "1 h 00 min"),
    ],
)
def test_seconds_at_the_edges(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


@given(st.floats(1e-4, 59))
def test_seconds_read_back_within_three_digits(seconds: float) -> None:
    number, unit = seconds_text(seconds).split(" ")
    factor = {"s": 1, "ms": 1e-3, "µs": 1e-6}[unit]
    assert float(number.replace(",", "")) * factor == pytest.approx(seconds, rel=0.006)


@given(st.floats(1e-3, 9e4))
def test_values_keep_four_digits(value: float) -> None:
    assert float(value_text(value).replace(",", "")) == pytest.approx(value, rel=6e-4)


def test_nothing_is_rounded_to_none() -> None:
    assert percent_text(1e-9) == "< 0.1 %"
    assert percent_text(0) == "0 %"
    assert error_text(0.0) == "0"
    assert re.fullmatch(r"3\.1e-15", error_text(3.14e-15))
