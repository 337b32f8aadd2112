"""Names of checkpoints, and which of them may go."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.run.checkpoint.retention import (
    doomed,
    is_leftover,
    listed,
    replaced_name,
    step_name,
    step_of,
)


@given(st.integers(0, 10**18 - 1))
def test_names_tell_their_step(step):
    assert step_of(step_name(step)) == step_of(replaced_name(step)) == step
    assert not is_leftover(step_name(step))
    assert is_leftover(f".{step_name(step)}.tmp-0f")


@pytest.mark.parametrize(
    "name", ["step-1", "step-0000000x", ".step-00000001", "step-00000001.tmp", "latest", ""]
)
def test_other_names_are_no_checkpoints(name):
    assert step_of(name) is None
    assert not is_leftover(name)


def test_the_newest_comes_first_and_what_replaces_before_what_is_replaced():
    names = ["step-00000002.replaced", "step-00000010", "x", "step-00000002", "step-100000000"]
    assert [saved.name for saved in listed(names)] == [
        "step-100000000",
        "step-00000010",
        "step-00000002",
        "step-00000002.replaced",
    ]


steps = st.sets(st.integers(0, 30))


@given(steps, steps, st.integers(0, 30), st.integers(0, 5))
def test_only_what_is_older_than_the_kept_goes(present, damaged, saved, keep):
    present = present | {saved}
    sound = sorted(present - (damaged - {saved}), reverse=True)
    names = [step_name(step) for step in present]
    gone = {step_of(name) for name in doomed(names, saved, keep, lambda n: step_of(n) in sound)}

    assert saved not in gone
    assert all(step < saved for step in gone)
    past = [step for step in sound if step <= saved]
    assert not gone & set(past[: max(keep, 2)])
    assert set(past) - gone == set(past[: max(keep, 2)])
    # A damaged one goes only with older ones: something newer and whole is always left.
    assert all(step < past[-1] or step < min(past[: max(keep, 2)]) for step in gone)


def test_nothing_goes_before_enough_are_whole():
    names = [step_name(step) for step in (10, 20, 30, 40)]
    assert doomed(names, 40, 3, lambda name: name in names[1:3]) == ()
    assert doomed(names, 40, 1, lambda name: name != names[2]) == (names[0],)
