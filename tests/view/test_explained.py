"""What `--explain` adds: every parameter once per pattern, conflicts, fallbacks."""

import io
from typing import Any

import pytest
from rich.console import Console

from meshwright.view.explained import explained
from tests.view.runs import accounts_record, run_record


def printed(run: dict[str, Any], width: int = 100) -> list[str]:
    stream = io.StringIO()
    Console(file=stream, width=width, highlight=False).print(explained(run))
    return [" ".join(line.split()) for line in stream.getvalue().splitlines()]


def test_layers_share_a_line_that_says_how_many_it_stands_for() -> None:
    lines = printed(run_record(4, 1, depth=8))
    assert "blocks.*.mlp.up.weight ×8 768 × 192 the same 768/data × 192" in lines
    assert "head.weight 256 × 192 the same 256/data × 192" in lines
    assert sum(line.startswith("blocks.") for line in lines) == 8


def test_layers_that_differ_are_told_apart() -> None:
    run = run_record(2, 0, depth=4)
    odd = next(p for p in run["parameters"] if p["name"] == "blocks.2.mlp.up.weight")
    odd |= {"weights": "sharded(0) over data", "optimizer": None}
    lines = printed(run)
    assert "blocks.{0,1,3}.mlp.up.weight ×3 768 × 192 the same the same" in lines
    assert "blocks.2.mlp.up.weight 768/data × 192 768 × 192 none" in lines


def test_gradients_say_what_they_owe() -> None:
    run = run_record(2, 0, depth=1)
    for parameter in run["parameters"]:
        parameter["gradients"] = "partial(sum) over data"
    assert "head.weight 256 × 192 partial over data the same" in printed(run)


def test_nothing_lost_is_said_too() -> None:
    lines = printed(run_record(2, 0))
    assert "No op's operands wanted different splits." in lines
    assert "Every op has a rule." in lines


def test_what_was_lost_is_told_with_its_cost_and_its_remedy() -> None:
    lines = printed(run_record(2, 0) | accounts_record())
    at = lines.index("my::scan ×3 gpt.py:70 blocks.*.scan, gathers 1.5 KiB")
    assert lines[at + 1] == 'mw.rule("my::scan", "n a -> n a")'
    at = lines.index("my::scan ×3 gpt.py:70 blocks.*.scan")
    assert lines[at + 1] == "operand 0 sharded(1) over tensor won"
    assert lines[at + 2] == (
        "operand 1 sharded(2) over tensor lost: to sharded(1) over tensor, moves 1.5 KiB"
    )


@pytest.mark.parametrize("width", [40, 80, 120])
def test_it_fits_any_width(width: int) -> None:
    run = run_record(2, 3) | accounts_record()
    stream = io.StringIO()
    Console(file=stream, width=width).print(explained(run))
    assert all(len(line) <= width for line in stream.getvalue().splitlines())


def test_an_empty_record_is_told_in_two_lines() -> None:
    assert [line for line in printed({}) if line] == [
        "No op's operands wanted different splits.",
        "Every op has a rule.",
    ]


def test_a_long_name_has_a_line_of_its_own() -> None:
    lines = printed(run_record(4, 1, depth=8), 48)
    at = lines.index("blocks.*.mlp.up.weight")
    assert lines[at + 1] == "×8 768 × 192 the same 768/data × 192"


def test_attention_says_its_form_where_and_why() -> None:
    run = run_record(2, 0, depth=1)
    run["attention"] = [
        {"form": "ring", "why": "1 head", "source": "a.py:3", "module": "blocks.*", "count": 2}
    ]
    lines = printed(run)
    place = lines.index("Attention over split sequences")
    assert lines[place + 1 : place + 3] == ["ring ×2 a.py:3 blocks.*", "1 head"]
