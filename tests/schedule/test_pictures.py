"""What each generator's comment draws is what it makes, and what is written here."""

from __future__ import annotations

from inspect import cleandoc

import pytest

from meshwright.schedule import (
    dualpipe_v,
    fill_drain,
    gpipe,
    interleaved,
    one_f_one_b,
    simulate,
    zero_bubble,
)
from meshwright.schedule.draw import columns, steps
from meshwright.schedule.named import SCHEDULES, schedule_of
from meshwright.schedule.simulate import timeline, uniform

PICTURES = [
    (gpipe, "gpipe", 3, 4, 1),
    (one_f_one_b, "1f1b", 3, 4, 1),
    (interleaved, "interleaved", 2, 4, 2),
    (zero_bubble, "zb-h1", 3, 4, 1),
    (zero_bubble, "zb-h2", 3, 6, 1),
    (zero_bubble, "zb-v", 2, 3, 2),
    (dualpipe_v, "dualpipe-v", 2, 4, 2),
    (fill_drain, "fill-drain", 3, 4, 1),
]

LITERALS = {
    "gpipe": """
    rank 0  0F0 0F1 0F2 0F3   .   .   .   . 0B0 0B1 0B2 0B3
    rank 1    . 1F0 1F1 1F2 1F3   .   . 1B0 1B1 1B2 1B3
    rank 2    .   . 2F0 2F1 2F2 2F3 2B0 2B1 2B2 2B3
    """,
    "1f1b": """
    rank 0  0F0 0F1 0F2   .   . 0B0 0F3 0B1   . 0B2   . 0B3
    rank 1    . 1F0 1F1   . 1B0 1F2 1B1 1F3 1B2   . 1B3
    rank 2    .   . 2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3
    """,
    "interleaved": """
    rank 0  0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1   . 2B2   . 2B3 0B2 0B3
    rank 1    . 1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3
    """,
    "zb-h1": """
    rank 0  0F0 0F1 0F2   .   . 0I0 0W0 0F3 0I1 0W1 0I2 0W2 0I3 0W3
    rank 1    . 1F0 1F1   . 1I0 1F2 1I1 1W0 1F3 1I2 1W1 1I3 1W2 1W3
    rank 2    .   . 2F0 2I0 2F1 2I1 2F2 2I2 2W0 2F3 2I3 2W1 2W2 2W3
    """,
    "zb-h2": """
    rank 0  0F0 0F1 0F2 0F3 0F4 0I0 0W0 0F5 0I1 0W1 0I2 0W2 0I3 0W3 0I4 0W4 0I5 0W5
    rank 1    . 1F0 1F1 1F2 1I0 1F3 1I1 1F4 1I2 1W0 1F5 1I3 1W1 1I4 1W2 1I5 1W3 1W4 1W5
    rank 2    .   . 2F0 2I0 2F1 2I1 2F2 2I2 2F3 2I3 2F4 2I4 2W0 2F5 2I5 2W1 2W2 2W3 2W4 2W5
    """,
    "zb-v": """
    rank 0  0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0I0 0W0 3F2 3I2 3W2 0I1 0W1 0I2 0W2
    rank 1    . 1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1I1 2I2 1I2 1W1 2W2 1W2
    """,
    "dualpipe-v": """
    rank 0  0F0 0F1 0F2 3F0 3I0 3W0 3F1 0F3 3B1 3F2 0B0 3B2 3F3 0B1 3B3 0I2 0W2 0I3 0W3
    rank 1    . 1F0 2F0 1F1 2F1 1F2 2B0 2F2 1B0 1F3 2B1 2F3 1B1 2B2 1B2 2I3 1I3 2W3 1W3
    """,
    "fill-drain": """
    rank 0  0F0 0F1 0F2 0F3
    rank 1    . 1F0 1F1 1F2 1F3
    rank 2    .   . 2F0 2F1 2F2 2F3
    """,
}


@pytest.mark.parametrize(("module", "name", "ranks", "microbatches", "virtual"), PICTURES)
def test_comment_generator_and_literal_are_one_picture(module, name, ranks, microbatches, virtual):
    drawn = columns(steps(schedule_of(name, ranks, microbatches, virtual)))
    assert drawn.strip() == cleandoc(LITERALS[name])
    assert drawn.strip() in cleandoc(module.__doc__.replace("\n    rank", "\nrank"))


def test_every_named_schedule_has_a_picture():
    assert {name for _, name, *_ in PICTURES} == set(SCHEDULES) - {"search"}


def test_long_actions_are_drawn_long():
    spans = timeline(schedule_of("1f1b", 2, 2), uniform(2))
    picture = columns(spans).strip()
    assert picture == cleandoc("""
        rank 0  0F0 0F1   .   . 0B0 ---   . 0B1 ---
        rank 1    . 1F0 1B0 --- 1F1 1B1 ---
        """)
    assert columns(spans, unit=2.0).count("---") == 0


def test_the_comment_of_the_simulator_is_true():
    spans = timeline(schedule_of("zb-h1", 2, 2), uniform(2))
    assert columns(spans).strip() in cleandoc(simulate.__doc__.replace("\n    rank", "\nrank"))
