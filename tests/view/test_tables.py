"""Plans and verifications as terminal tables."""

import io

import pytest
from rich.console import Console, RenderableType

from meshwright.view.tables import plan_table, verify_table
from tests.view.runs import run_record, verify_record


def printed(table: RenderableType, width: int = 120) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width).print(table)
    return stream.getvalue()


def test_a_plan_says_who_holds_needs_and_moves_what() -> None:
    text = printed(plan_table(run_record(4, 3)))
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "weights sharded over data 69 1/4 of it" in rows
    assert "memory rank 0 ranks 1–3" in rows
    assert "optimizer 7.0 MiB 7.0 MiB" in rows
    assert "in all 38.0 MiB 35.0 MiB" in rows
    assert "31.5 MiB 208 in all" in rows
    at = rows.index("3.4 MiB 8 all_gather over data sharded -> replicated")
    assert rows[at + 1] == "blocks.0–7.mlp.up gpt.py:58"


def test_what_is_folded_into_smaller_ones_adds_up_to_the_whole() -> None:
    run = run_record(4, 3)
    rows = [line.split() for line in printed(plan_table(run)).splitlines()]
    kinds = {"all_gather", "all_reduce", "reduce_scatter", "smaller"}
    calls = [int(row[2]) for row in rows if kinds & set(row)]
    assert sum(calls) == len(run["collectives"])


def test_what_is_exposed_is_said_of_each() -> None:
    run = run_record(2, 0, depth=2)
    for number, entry in enumerate(run["collectives"]):
        entry |= {"exposed": number % 2, "count": 1, "module": "m", "source": "gpt.py:1"}
    text = printed(plan_table(run | {"traffic": {"messages": 7}}, rows=None))
    assert "9 of 18 exposed" in text or " of " in text
    assert "in 7 messages" in text


@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_line_is_cut_or_wider_than_the_terminal(width: int) -> None:
    text = printed(plan_table(run_record(4, 3), rows=None), width)
    assert "…" not in text
    assert all(len(line) <= width for line in text.splitlines())


@pytest.mark.parametrize("width", [40, 80, 200])
def test_hostile_names_are_only_text_at_any_width(width: int) -> None:
    run = run_record(2, 0, depth=1)
    run["plan"] = "[bold red]x[/]"
    run["collectives"][0]["module"] = "[/]"
    assert "[bold red]x[/]" in printed(plan_table(run), width)


def test_an_empty_plan_is_one_device() -> None:
    assert printed(plan_table({})).split("\n")[:2] == [
        "one device",
        "One rank holds the whole model",
    ]


def test_a_broken_law_is_marked_where_it_is_broken() -> None:
    verify = verify_record(passed=False)
    verify["worst_relative_error"]["optimizer"] = 1e-12
    rows = {
        row.split()[0]: row for row in printed(verify_table(verify)).splitlines() if row.strip()
    }
    assert rows["FAIL"].endswith("Not the numbers of one device: worst relative error 2.4e-03")
    assert [kind for kind, row in rows.items() if "BROKEN" in row] == ["gradients", "weights"]
    assert "ok" in rows["optimizer"]


def test_a_kept_law_passes() -> None:
    text = printed(verify_table(verify_record()))
    assert text.startswith("PASS")
    assert "BROKEN" not in text
    assert "plan zero3,data=4 on 4 ranks, 5 steps, float64" in text
