"""Sizes in bytes, written and read."""

from __future__ import annotations

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.errors import UsageError
from meshwright.plan import size
from meshwright.plan.size import bytes_text, parse_bytes


def test_examples():
    assert doctest.testmod(size).failed == 0


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("0", 0), ("7 b", 7), ("2MiB", 2 * 2**20), ("2mib", 2 * 2**20), (" 1.5 GiB ", 3 * 2**29),
        ("3kB", 3000), ("1TB", 10**12), (12, 12),
    ],
)  # fmt: skip
def test_what_a_size_is(text, found):
    assert parse_bytes(text) == found


@pytest.mark.parametrize(
    "text", ["", "MiB", "-1", "2 Mi", "2MiB extra", "1e3", "0x10", "nan", "1,5MB"]
)
def test_what_no_size_is(text):
    with pytest.raises(UsageError, match="--memory takes bytes, as in 512KiB, 2MiB"):
        parse_bytes(text, "--memory")


@given(st.integers(0, 2**55))
def test_a_printed_size_is_read_again_to_its_last_digit(number):
    text = bytes_text(number)
    read = parse_bytes(text.replace(",", ""))
    assert abs(read - number) <= max(0.5, 0.051 * 1024 ** _power(text))


def _power(text):
    return ["B", "KiB", "MiB", "GiB", "TiB", "PiB"].index(text.split()[1])
