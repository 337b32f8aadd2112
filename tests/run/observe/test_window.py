"""Which steps are traced: as asked for, or five after two to warm up; never outside the run."""

from __future__ import annotations

import pytest

from meshwright.errors import UsageError
from meshwright.run.observe.window import Steps, parse_steps, within


@pytest.mark.parametrize(("text", "want"), [("3-7", (3, 7)), ("5", (5, 5)), ("1-1", (1, 1))])
def test_a_step_or_a_range(text, want):
    assert parse_steps(text) == Steps(*want)


@pytest.mark.parametrize("text", ["", "x", "3-", "-3", "7-3", "0", "0-2", "3-7-9", "1.5", "3,4"])
def test_anything_else_is_refused_with_a_form_that_is_not(text):
    with pytest.raises(UsageError, match="trace steps"):
        parse_steps(text)


@pytest.mark.parametrize(
    ("done", "total", "want"),
    [
        (0, 100, (3, 7)), (0, None, (3, 7)), (50, 100, (53, 57)), (0, 5, (3, 5)), (0, 2, (2, 2)),
        (0, 1, (1, 1)), (50, 51, (51, 51)),
    ],
)  # fmt: skip
def test_by_default_steps_after_the_warm_up_fewer_in_short_runs(done, total, want):
    assert within(True, done, total) == Steps(*want)


def test_steps_that_are_not_taken_are_refused():
    assert within(Steps(3, 7), 2, 7) == Steps(3, 7)
    for done, total in ((3, 10), (0, 6)):
        with pytest.raises(UsageError, match=f"steps {done + 1} to {total}"):
            within(Steps(3, 7), done, total)
    with pytest.raises(UsageError, match="steps 9 on"):
        within(Steps(3, 7), 8, None)
