"""The text form: there and back; an error names the line and the item."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.errors import PlanError
from meshwright.schedule.named import SCHEDULES, schedule_of
from meshwright.schedule.text import from_text, to_text


@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 6), st.integers(1, 9))
def test_there_and_back(name, ranks, microbatches):
    schedule = schedule_of(name, ranks, microbatches, 2 if name == "interleaved" else 1)
    assert from_text(to_text(schedule), name) == schedule


def test_the_form():
    assert to_text(schedule_of("1f1b", 2, 2)) == "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n"


def test_bubbles_and_overlapped_pairs_of_torch_are_read():
    schedule = from_text("0F0, ,(0F1;0B0)OVERLAP_F_B,,0B1\r\n")
    assert [str(action) for action in schedule.ranks[0]] == ["0F0", "0F1", "0B0", "0B1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,0B0\n1F0,1X0\n", r"schedule mine, line 2, item 2: '1X0' is not an action; write st"),
        ("0F0,0B\n", "line 1, item 2: '0B' is not an action"),
        ("0F0\n\n0SEND_F0\n", "line 3, item 1: '0SEND_F0' is not an action"),
        ("0F٣", "line 1, item 1: '0F٣' is not an action"),
        ("", "schedule mine has no actions; write one line per rank"),
        ("\n,,\n", "schedule mine has no actions"),
        ("0F0\n2F0\n", "has stage 2 but no stage 1; stages are counted from 0 without gaps"),
        ("0F0,1F0\n1F1\n", "stage 1 is on line 1 and, with 1F1, on line 2; a stage stays on one"),
        (f"0F0,{'9' * 5000}F0\n", "line 1, item 2: .* is not an action"),
        ("0F999999999\n", "line 1, item 1: '0F999999999' is not an action"),
    ],
)
def test_malformed_text_is_refused(text, message):
    with pytest.raises(PlanError, match=message):
        from_text(text, "mine")


@given(st.text("0123FBIW,;()\n ", max_size=60))
def test_any_text_is_read_or_refused(text):
    try:
        schedule = from_text(text)
    except PlanError:
        return
    assert from_text(to_text(schedule)) == schedule
