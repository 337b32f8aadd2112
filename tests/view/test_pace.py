"""Speed and forecast."""

import pytest

from meshwright.view.pace import Pace


def test_nothing_is_said_before_two_steps_and_the_slow_first_one_is_forgotten() -> None:
    first = Pace().after(30.0, 64)
    assert first.samples_per_second is None
    assert first.left(10) is None
    second = first.after(0.5, 64)
    assert second.samples_per_second == pytest.approx(128)
    assert second.left(10) == pytest.approx(5.0)


def test_a_lasting_change_is_followed_and_one_slow_step_hardly() -> None:
    pace = Pace()
    for _ in range(50):
        pace = pace.after(1.0, 10)
    assert 8 < (pace.after(2.0, 10).samples_per_second or 0) < 10
    for _ in range(50):
        pace = pace.after(2.0, 10)
    assert pace.samples_per_second == pytest.approx(5, rel=0.02)


def test_steps_past_the_end_and_untimed_steps() -> None:
    assert Pace().after(1, 1).after(1, 1).left(-5) == 0
    assert Pace().after(0, 1).after(0, 1).left(5) is None
