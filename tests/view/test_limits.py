"""What is said of a plan over a limit."""

import pytest

from meshwright.errors import PlanError
from meshwright.plan.plan import Plan
from meshwright.view.limits import over_budget, over_memory, require_limits
from tests.program.accounted import gpt
from tests.view.runs import accounts_record, run_record

MIB = 2**20


def test_the_list_is_whole_and_the_largest_comes_first() -> None:
    lines = over_budget(run_record(4, 3), 2 * MIB, []).splitlines()
    assert lines[0] == (
        "plan zero3,data=4 moves 31.5 MiB per rank and step, but the budget is 2.0 MiB:"
    )
    end = lines.index("to move less:")
    sizes = [line.split() for line in lines[1:end] if "×" in line]
    numbers = [float(n) * (MIB if unit == "MiB" else 1024) for n, unit, *_ in sizes]
    assert len(numbers) == 12
    assert numbers == sorted(numbers, reverse=True)
    assert "smaller ones" in lines[end - 1]


def test_plans_that_move_less_are_named_the_least_first() -> None:
    others = [("data=4", 3 * MIB, 9), ("zero2,data=4", 50 * MIB, 8), ("data=2,tensor=2", MIB, 7)]
    text = over_budget(run_record(4, 3), 2 * MIB, others)
    assert text.splitlines()[-2:] == [
        "  - data=2,tensor=2 moves 1.0 MiB; a rank needs 7 B",
        "  - data=4 moves 3.0 MiB, still too much; a rank needs 9 B",
    ]
    assert "zero2" not in text


def test_ops_without_a_rule_and_conflicts_come_with_their_remedies() -> None:
    text = over_budget(run_record(2, 0) | accounts_record(), 1, [])
    assert "my::scan at gpt.py:70 has no rule and gathers 1.5 KiB: declare mw.rule(" in text
    assert (
        "operand 1 sharded(2) over tensor is moved to sharded(1) over tensor, 1.5 KiB; annotate"
        in text
    )


def test_where_nothing_helps_that_is_said() -> None:
    assert over_budget(run_record(2, 0), 1, []).endswith("use fewer ranks, or raise the budget")


def test_parts_of_memory_come_largest_first_with_the_cheapest_plan_that_fits() -> None:
    others = [("zero1,data=4", 40 * MIB, 9 * MIB), ("data=2,tensor=2", 20 * MIB, 9 * MIB),
              ("tensor=4", MIB, 11 * MIB)]  # fmt: skip
    lines = over_memory(run_record(4, 3), 10 * MIB, others).splitlines()
    assert lines[0] == "plan zero3,data=4 needs 38.0 MiB on rank 0, but there are 10.0 MiB:"
    assert [line.split(maxsplit=2)[2] for line in lines[1:-1]] == [
        "saved activations", "optimizer", "weights", "gradients", "buffers",
    ]  # fmt: skip
    assert lines[-1] == (
        "use data=2,tensor=2: it needs 9.0 MiB, and a rank moves 20.0 MiB a step where this plan "
        "moves 31.5 MiB"
    )


def test_where_no_plan_fits_the_least_is_named() -> None:
    last = over_memory(run_record(4, 3), MIB, [("a", 1, 3 * MIB), ("b", 2, 2 * MIB)])
    assert "no plan near this one fits; b needs least, 2.0 MiB: start more ranks" in last
    assert over_memory(run_record(1, 0), 1, []).endswith(
        "start more ranks, or use a smaller model or batch"
    )


def test_limits_that_are_kept_are_silent_and_at_their_edge() -> None:
    run = run_record(4, 3)
    moved = sum(entry["bytes"] for entry in run["collectives"])
    needed = max(sum(entry["parts"].values()) for entry in run["memory"])
    job, plan = gpt(1), Plan(data=4, zero=3)
    require_limits(job, plan, run)
    require_limits(job, plan, run, max_bytes=moved, memory=needed)
    with pytest.raises(PlanError, match="the budget is"):
        require_limits(job, plan, run, max_bytes=moved - 1)
    with pytest.raises(PlanError, match="saved activations"):
        require_limits(job, plan, run, memory=needed - 1)
