"""The table of pipelines: shares of the ideal from seconds."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from benchmarks.harness.lines import Line, judged
from benchmarks.page.pipelines import balance, table
from benchmarks.reach import GROUPS, ideal


def test_the_ideal_is_what_bubbles_leave():
    assert ideal(2, 1) == pytest.approx(2 * 8 / 9)
    assert ideal(2, 2) == pytest.approx(2 * 8 / 8.5)
    assert ideal(4, 1) == pytest.approx(4 * 8 / 11)


def test_a_line_with_an_ideal_tells_the_share_of_it():
    line = Line("k", "what", "pipe", ("solo",), 0.97, ideal=ideal(2, 1))
    found, said = judged(line, {"pipe": [0.5625] * 6, "solo": [1.0] * 6})
    assert found.median == pytest.approx(1.0)
    assert said == "holds"


def test_everyone_is_in_the_table_with_shares_of_its_own_solo():
    (group,) = [g for g in GROUPS if g.name == "pipeline"]
    seconds = {name: [2.0] * 6 for name in group.contestants}
    seconds |= {"solo": [4.0] * 6, "1f1b": [2.25] * 6, "stage 0": [1.0] * 6, "stage 1": [1.25] * 6}
    raw = {
        "seconds": seconds,
        "tasks": {name: asdict(task) for name, task in group.contestants.items()},
        "rank_peak_bytes": dict.fromkeys(group.contestants, (2**20, 2**21)),
    }
    assert balance(seconds) == pytest.approx(0.9)
    rows = {row.split(" | ")[0][2:]: row for row in table(raw).splitlines() if row[:2] == "| "}
    assert rows["1f1b"] == "| 1f1b | 910 | 1.778 | 1.000 | 1.111 | 1 / 2 |"
    assert rows["torch 1f1b"].startswith("| torch 1f1b | 1,024 | 1.000 | 0.562 |")
    assert "stage 0" not in rows
