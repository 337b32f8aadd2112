"""What to say of a plan that is over a limit: the list, largest first, and what to change."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from meshwright.errors import PlanError
from meshwright.job import Job
from meshwright.plan.plan import Plan
from meshwright.run.neighbours import lighter, priced, smaller
from meshwright.view.accounts import alike
from meshwright.view.runfile import Setup, parse_setup
from meshwright.view.staged import sent_bytes
from meshwright.view.traffic import Row, hidden_text, phases
from meshwright.view.units import bytes_text

__all__ = ["Alternative", "over_budget", "over_memory", "require_limits"]

Alternative = tuple[str, int, int]
"""A plan's text, the bytes that it moves per rank and step, and those that a rank needs."""

_MOST = 12


def require_limits(
    job: Job,
    plan: Plan,
    run: Mapping[str, Any],
    *,
    max_bytes: int | None = None,
    memory: int | None = None,
) -> None:
    """Return if a plan keeps within what a rank may move in a step, and may need.

    Args:
        job: that the plan is for.
        plan: with `data`.
        run: what the plan means, as `run.json` has it.
        max_bytes: that a rank may move in a step.
        memory: bytes that a rank has.

    Raises:
        PlanError: with what is moved or needed, largest first, and what to change.
    """
    moved = sum(entry["bytes"] for entry in run["collectives"]) + sent_bytes(run)
    if memory is not None and max(sum(e["parts"].values()) for e in run["memory"]) > memory:
        raise PlanError(over_memory(run, memory, _priced(job, smaller(plan, job.batch_size))))
    if max_bytes is not None and moved > max_bytes:
        raise PlanError(over_budget(run, max_bytes, _priced(job, lighter(plan))))


def _priced(job: Job, plans: Iterable[Plan]) -> list[Alternative]:
    return [(found.plan.label, found.moved, found.memory) for found in priced(job, plans)]


def over_budget(run: Mapping[str, Any], limit: int, others: Sequence[Alternative]) -> str:
    """A plan that moves more than `limit` bytes per rank and step.

    Args:
        run: as `run.json` has it.
        limit: bytes.
        others: plans to take in its place.
    """
    setup = parse_setup(run)
    sent = sent_bytes(run)
    moved = sum(entry.bytes for entry in setup.collectives) + sent
    rows = [(phase.name, row) for phase in phases(setup.collectives) for row in phase.rows]
    rows.sort(key=lambda found: -found[1].bytes)
    head = f"plan {setup.plan} moves {bytes_text(moved)} per rank and step"
    lines = [f"{head}, but the budget is {bytes_text(limit)}:"]
    lines += itertools.chain.from_iterable(_lines(*row) for row in rows[:_MOST])
    if len(rows) > _MOST:
        rest = sum(row.bytes for _, row in rows[_MOST:])
        lines.append(f"{bytes_text(rest):>11}  {len(rows) - _MOST} smaller ones")
    lines += [f"{bytes_text(sent):>11}  sent to other stages"] if sent else []
    less = sorted((other for other in others if other[1] < moved), key=lambda other: other[1])
    lines += ["to move less:", *_remedies(setup)]
    lines += [
        f"  - {plan} moves {bytes_text(size)}{'' if size <= limit else ', still too much'}; "
        f"a rank needs {bytes_text(memory)}"
        for plan, size, memory in less[:3]
    ]
    if lines[-1] == "to move less:":
        lines.append("  - no plan near this one moves less: use fewer ranks, or raise the budget")
    return "\n".join(lines)


def _lines(phase: str, row: Row) -> Iterator[str]:
    words = (f"{row.count:,} × {row.op} over {row.axis}", phase, row.why, hidden_text(row))
    yield f"{bytes_text(row.bytes):>11}  {', '.join(word for word in words if word)}"
    where = "  ".join(word for word in (row.modules, row.source) if word)
    if where:
        yield f"{'':13}{where}"


def _remedies(setup: Setup) -> Iterator[str]:
    """What the op or the annotation that costs most is, where it is one of these."""
    for found in alike(setup.fallbacks)[:2]:
        if found.bytes:
            yield (
                f"  - {found.op} at {found.source} has no rule and gathers "
                f"{bytes_text(found.bytes)}: declare {found.remedy}, if only its first dim may "
                "be split"
            )
    for lost in alike(setup.conflicts)[:2]:
        if lost.bytes:
            yield (
                f"  - {lost.op} at {lost.source} wants its operands split alike over {lost.axis}: "
                f"{lost.loser} is moved to {lost.wanted}, {bytes_text(lost.bytes)}; annotate it so "
                "where it is made"
            )


def over_memory(run: Mapping[str, Any], limit: int, others: Sequence[Alternative]) -> str:
    """A plan that needs more than `limit` bytes on a rank.

    Args:
        run: as `run.json` has it.
        limit: bytes.
        others: plans to take in its place, the least change first.
    """
    setup = parse_setup(run)
    moved = sum(entry.bytes for entry in setup.collectives)
    worst = max(setup.memory, key=lambda entry: entry.total)
    parts = sorted(worst.parts, key=lambda part: -part[1])
    head = f"plan {setup.plan} needs {bytes_text(worst.total)} on rank {worst.rank}"
    lines = [
        f"{head}, but there are {bytes_text(limit)}:",
        *(f"{bytes_text(size):>11}  {name}" for name, size in parts if size),
    ]
    fitting = [other for other in others if other[2] <= limit]
    if fitting:
        plan, size, memory = min(fitting, key=lambda other: other[1])
        lines.append(
            f"use {plan}: it needs {bytes_text(memory)}, and a rank moves {bytes_text(size)} a "
            f"step where this plan moves {bytes_text(moved)}"
        )
    elif others:
        plan, _, memory = min(others, key=lambda other: other[2])
        lines.append(
            f"no plan near this one fits; {plan} needs least, {bytes_text(memory)}: start more "
            "ranks, or use a smaller model or batch"
        )
    else:
        lines.append("start more ranks, or use a smaller model or batch")
    return "\n".join(lines)
