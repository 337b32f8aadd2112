"""Plans and verifications as terminal tables; rich renderables, to be printed by the caller."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from meshwright.view.chart.memory import equal_bills
from meshwright.view.findings import mesh_finding, verification_text
from meshwright.view.folder import parse_verification
from meshwright.view.layouts import KINDS, layout_of, shards
from meshwright.view.runfile import Setup, parse_setup
from meshwright.view.traffic import Phase, phases
from meshwright.view.units import bytes_text, count_text, error_text

__all__ = ["plan_table", "verify_table"]

_ROWS_PER_PHASE = 6
_MOST_BILLS = 16
_WRAPPED = frozenset({"module", "because", "layout"})


def plan_table(run: Mapping[str, Any], *, rows: int | None = _ROWS_PER_PHASE) -> RenderableType:
    """What the plan in a decoded `run.json` means: who holds, needs and moves how much.

    Args:
        run: as `run.json` has it.
        rows: kinds of collectives shown of each phase, the largest; None shows all.
    """
    setup = parse_setup(run)
    head = Text.assemble((setup.plan or "one device", "bold"), "  ", mesh_finding(setup))
    parts: list[RenderableType] = [head]
    if setup.parameters:
        parts += [Text(), _state(setup)]
    if setup.memory:
        parts += [Text(), _memory(setup)]
    if setup.collectives:
        parts += [Text(), _traffic(setup, rows)]
    return Group(*parts)


def _table(*columns: str) -> Table:
    """A table without lines; a column whose title begins with `>` holds numbers."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for title in columns:
        number = title.startswith(">")
        table.add_column(
            title.removeprefix(">"),
            justify="right" if number else "left",
            no_wrap=title not in _WRAPPED,
        )
    return table


def _state(setup: Setup) -> Table:
    table = _table("state", "layout", ">tensors", "each rank keeps")
    for kind in KINDS:
        layouts = Counter(layout_of(parameter, kind) for parameter in setup.parameters)
        for layout, tensors in layouts.items():
            count = shards(layout, setup.axes)
            share = "nothing" if not count else "all of it" if count == 1 else f"1/{count} of it"
            table.add_row(Text(kind), Text(layout), count_text(tensors), share)
    return table


def _memory(setup: Setup) -> Table:
    names = list(dict.fromkeys(name for entry in setup.memory for name, _ in entry.parts))
    table = _table("memory", *(f">{name}" for name in names), ">total")
    bills = equal_bills(setup.memory)
    for ranks, entry in bills[:_MOST_BILLS]:
        parts = dict(entry.parts)
        row = [bytes_text(parts.get(name, 0)) for name in names]
        table.add_row(Text(ranks), *row, Text(bytes_text(entry.total), "bold"))
    if len(bills) > _MOST_BILLS:
        table.caption = f"and {len(bills) - _MOST_BILLS} more, which need less"
    return table


def _traffic(setup: Setup, rows: int | None) -> Table:
    table = _table(
        "moved", "collective", "axis", ">per step", ">calls", "source", "module", "because"
    )
    found = phases(setup.collectives)
    for phase in found:
        _add_phase(table, phase, rows)
    total = sum(phase.bytes for phase in found)
    calls = sum(phase.count for phase in found)
    table.add_row("in all", "", "", bytes_text(total), count_text(calls), style="bold")
    return table


def _add_phase(table: Table, phase: Phase, rows: int | None) -> None:
    shown = len(phase.rows) if rows is None else rows
    for index, row in enumerate(phase.rows[:shown]):
        table.add_row(
            Text("" if index else phase.name),
            Text(row.op),
            Text(row.axis),
            bytes_text(row.bytes),
            count_text(row.count),
            Text(row.source),
            Text(row.modules),
            Text(row.why),
        )
    rest = phase.rows[shown:]
    if rest:
        calls, size = sum(row.count for row in rest), sum(row.bytes for row in rest)
        words = Text(f"{len(rest)} smaller", "dim")
        table.add_row("", words, "", bytes_text(size), count_text(calls))


def verify_table(verify: Mapping[str, Any]) -> RenderableType:
    """What a decoded `verify.json` says: each error against its law."""
    result = parse_verification(verify)
    table = _table("compared", ">worst relative error", ">law", "")
    for kind, error in result.errors:
        law = result.law(kind)
        holds = law is not None and error <= law
        mark = Text("") if law is None else Text("ok" if holds else "BROKEN", _style(holds))
        table.add_row(
            Text(kind), error_text(error), "" if law is None else f"≤ {error_text(law)}", mark
        )
    verdict = Text("PASS  " if result.passed else "FAIL  ", _style(result.passed) + " bold")
    facts = (
        f"plan {result.plan} on {result.ranks:,} rank{'s' * (result.ranks != 1)}, "
        f"{result.steps:,} step{'s' * (result.steps != 1)}, {result.dtype}"
    )
    lines: list[RenderableType] = [Text.assemble(verdict, verification_text(result)), Text(facts)]
    if result.worst_tensor:
        lines.append(Text(f"worst tensor: {result.worst_tensor}"))
    return Group(*lines, Text(), table)


def _style(good: bool) -> str:  # noqa: FBT001 - a two-way choice of colour
    return "green" if good else "red"
