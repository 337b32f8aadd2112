"""How much of communication is hidden: as worked out by hand, and never outside its bounds."""

from __future__ import annotations

from itertools import accumulate

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from meshwright.view.overlap import overlap
from meshwright.view.parts import Part, Slice, read_parts
from tests.view.traces import RUN, START, WAIT, written


def test_by_hand(tmp_path):
    body = [RUN, START, RUN, WAIT, RUN]  # 1 s, 0.1 s, 2 s, 0.4 s, 1 s
    written(tmp_path, 0, body, (3, [0.0, 1.0, 1.1, 3.1, 3.5, 4.5]))
    found = overlap(read_parts(tmp_path))
    assert found.total == pytest.approx(4.5)
    assert found.waiting == pytest.approx(0.5)
    assert found.under_way == pytest.approx(2.5)
    assert found.hidden == pytest.approx(2.0)


def test_nothing_traced_is_nothing():
    assert overlap([]).under_way == 0


KIND = st.sampled_from(["Run", "Start", "Wait", "Free"])


@given(st.lists(st.tuples(KIND, st.floats(0, 1), st.sampled_from("ab")), min_size=1, max_size=30))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_hidden_is_computed_and_under_way(instructions):
    times = [0.0, *accumulate(seconds for _, seconds, _ in instructions)]
    slices = [
        Slice(
            3,
            place,
            {"kind": kind, "pending": name} | ({"phase": ""} if kind == "Run" else {}),
            times[place],
            times[place + 1],
        )
        for place, (kind, _, name) in enumerate(instructions)
    ]
    found = overlap([Part(0, {}, "h", 1, slices=slices)])
    computing = sum(seconds for kind, seconds, _ in instructions if kind == "Run")
    small = 1e-9
    assert -small <= found.hidden <= min(computing, found.under_way) + small
    assert found.under_way <= found.total + small
    assert found.waiting <= found.total + small
