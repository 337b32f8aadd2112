"""The bill beside what was measured: every byte in one row, differences in percent."""

from __future__ import annotations

import io

from rich.console import Console

from meshwright.view.bar import memory_bar
from meshwright.view.foretold import measured_table
from meshwright.view.measured import compared, difference_text
from meshwright.view.runfile import parse_setup

MIB = 2**20


def run():
    parts = {"weights": 40, "gradients": 40, "optimizer": 80, "buffers": 0,
             "saved activations": 100, "working memory": 20}  # fmt: skip
    there = {"weights": 40, "optimizer": 80, "gradients": 38, "saved activations": 90,
             "communication buffers": 6}  # fmt: skip
    return {
        "plan": "zero1,data=2",
        "process": 200 * MIB,
        "memory": [
            {"rank": rank, "parts": {k: v * MIB for k, v in parts.items()},
             "beside": {"communication buffers": 6 * MIB, "slack": 40 * MIB},
             "peak": 300 * MIB, "saving": 120 * MIB}
            for rank in (0, 1)
        ],
        "measured": [
            {"rank": rank, "parts": {k: v * MIB for k, v in there.items()},
             "process": 200 * MIB, "rest": 0, "away": {}, "peak": peak * MIB}
            for rank, peak in ((0, 490), (1, 520))
        ],
    }  # fmt: skip


def shown(part):
    page = Console(file=io.StringIO(), width=120, color_system=None)
    page.print(part)
    return page.file.getvalue()


def test_rows_add_up_and_the_neediest_rank_comes_first():
    first, second = compared(run())
    assert (first.rank, first.bill, first.peak) == (1, 500 * MIB, 520 * MIB)
    assert second.rank == 0
    for one in (first, second):
        assert sum(foretold for _, foretold, _ in one.rows) == one.bill
        assert sum(there for _, _, there in one.rows) == one.peak
    assert first.saved == (100 * MIB, 90 * MIB)
    assert difference_text(first) == "4.0 % over its bill"
    assert difference_text(second) == "2.0 % under its bill"


def test_copies_and_host_memory_count_where_there_were_any():
    made = run()
    made["measured"][1]["parts"]["copies for checkpoints"] = 118 * MIB
    made["memory"][1]["away"] = {"host": 30 * MIB, "disk": 9}
    made["measured"][1]["away"] = {"host": 31 * MIB, "disk": 9}
    first, _ = compared(made)
    rows = {name: pair for name, *pair in first.rows}
    assert rows["copies for checkpoints"] == [120 * MIB, 118 * MIB]
    assert rows["host memory"] == [30 * MIB, 31 * MIB]
    assert first.bill == 620 * MIB
    assert sum(foretold for _, foretold, _ in first.rows) == first.bill


def test_nothing_measured_is_no_table():
    assert measured_table({**run(), "measured": []}) is None
    assert compared({"measured": [{"rank": 3, "peak": 1}]}) == ()


def test_the_table_tells_both_and_the_difference():
    text = shown(measured_table(run()))
    assert "rank 1: bill" in text
    assert "at once" in text
    assert "500.0 MiB" in text
    assert "520.0 MiB" in text
    assert "+4.0 %" in text
    assert "-2.0 %" in text


def test_the_bar_gives_each_part_its_share():
    bar, legend, *_ = memory_bar(parse_setup(run())).plain.splitlines()
    marks, names = bar.split("  ")
    assert names == "ranks 0–1"
    assert len(marks) == 60
    whole = 40 + 40 + 80 + 100 + 20 + 46 + 200
    assert marks.count("P") == round(60 * 200 / whole) == 23
    assert abs(marks.count("O") - 60 * 80 / whole) <= 1
    assert marks.count("W") + marks.count("G") in (8, 9, 10)
    assert "W weights  G gradients  O optimizer  A saved activations" in legend
    assert "B buffers" not in legend
