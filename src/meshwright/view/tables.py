"""Plans and verifications as terminal tables; rich renderables, to be printed by the caller."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from meshwright.view.again import remat_line
from meshwright.view.bar import memory_bar
from meshwright.view.chart.memory import equal_bills
from meshwright.view.findings import mesh_finding, verification_text
from meshwright.view.folder import parse_verification
from meshwright.view.layouts import KINDS, layout_of, placements, shards
from meshwright.view.runfile import RankMemory, Setup, parse_setup
from meshwright.view.staged import pipeline_table
from meshwright.view.traffic import Phase, Row, hidden_text, phases
from meshwright.view.units import bytes_text, count_text, error_text

__all__ = ["Lines", "plain_table", "plan_table", "verify_table"]

_ROWS_PER_PHASE = 6
_MOST_BILLS = 3
_WRAPPED = frozenset({"layout"})


def plan_table(run: Mapping[str, Any], *, rows: int | None = _ROWS_PER_PHASE) -> RenderableType:
    """What the plan in a decoded `run.json` means: who holds, needs and moves how much.

    Args:
        run: as `run.json` has it.
        rows: kinds of collectives shown of each phase, the largest; None shows all.
    """
    setup = parse_setup(run)
    parts: list[RenderableType] = [Text(setup.plan or "one device", "bold")]
    parts.append(Text(mesh_finding(setup)))
    if (stages := pipeline_table(run)) is not None:
        parts += [Text(), stages]
    if again := remat_line(run):
        parts += [Text(), Text(again)]
    if setup.parameters:
        parts += [Text(), _state(setup)]
    if setup.memory:
        parts += [Text(), _memory(setup), Text(), memory_bar(setup)]
    if setup.collectives:
        parts += [Text(), _traffic(setup, rows)]
    return Group(*parts)


@dataclass(frozen=True, slots=True)
class Lines:
    """Lines that depend on the width there is: `draw(width)`."""

    draw: Callable[[int], Iterable[RenderableType]]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """As rich asks for it."""
        yield from self.draw(options.max_width)


def plain_table(*columns: str, wrapped: frozenset[str] = _WRAPPED) -> Table:
    """A table without lines; a column whose title begins with `>` holds numbers.

    Args:
        *columns: their titles.
        wrapped: titles of those that are broken into lines where there is no room.
    """
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for title in columns:
        number = title.startswith(">")
        table.add_column(
            title.removeprefix(">"),
            justify="right" if number else "left",
            no_wrap=title not in wrapped,
            overflow="fold",
        )
    return table


def _state(setup: Setup) -> Table:
    table = plain_table("state", "layout", ">tensors", "each rank keeps")
    staged = dict(setup.axes).get("pipeline", 1) > 1
    for kind in KINDS:
        tensors: dict[tuple[str, int], int] = {}
        for parameter in setup.parameters:
            layout = layout_of(parameter, kind)
            key = (_short(layout), shards(layout, setup.axes))
            tensors[key] = tensors.get(key, 0) + 1
        for (layout, count), number in tensors.items():
            share = _share(layout, count)
            share = share.replace("of it", "of its stages’") if staged else share
            table.add_row(Text(kind), Text(layout), count_text(number), share)
    return table


def _share(layout: str, count: int) -> str:
    """What of a tensor that is cut in `count` parts a rank keeps."""
    if "fused" in layout:
        return "by part" if count == 1 else f"1/{count}, by part"
    return "nothing" if not count else "all of it" if count == 1 else f"1/{count} of it"


def _short(layout: str) -> str:
    """A layout without its dims: `partial over data, sharded over tensor`."""
    found = placements(layout)
    return ", ".join(f"{kind} over {axis}" for kind, _, axis in found) if found else layout


_AWAY = {"host": "beside it in host memory", "disk": "on disk"}


def _memory(setup: Setup) -> Table:
    names = list(dict.fromkeys(name for entry in setup.memory for name, _ in entry.parts))
    bills = equal_bills(setup.memory)
    table = plain_table("memory", *(f">{ranks}" for ranks, _ in bills[:_MOST_BILLS]))
    for name in names:
        sizes = (dict(entry.parts).get(name, 0) for _, entry in bills[:_MOST_BILLS])
        table.add_row(Text(name), *map(bytes_text, sizes))
    totals = (bytes_text(entry.total) for _, entry in bills[:_MOST_BILLS])
    table.add_row("in all", *totals, style="bold")
    if bills[0][1].peak:
        _with_process(table, setup, [entry for _, entry in bills[:_MOST_BILLS]])
    for tier in dict.fromkeys(tier for entry in setup.memory for tier, size in entry.away if size):
        kept = (bytes_text(dict(entry.away).get(tier, 0)) for _, entry in bills[:_MOST_BILLS])
        table.add_row(_AWAY.get(tier, tier), *kept)
    if len(bills) > _MOST_BILLS:
        table.caption = f"and {len(bills) - _MOST_BILLS} more bills, which are smaller"
    return table


def _with_process(table: Table, setup: Setup, shown: Sequence[RankMemory]) -> None:
    """What processes hold beside tensors, and what all comes to at once."""
    for name in dict.fromkeys(name for entry in shown for name, size in entry.beside if size):
        table.add_row(Text(name), *(bytes_text(dict(entry.beside).get(name, 0)) for entry in shown))
    if setup.process:
        table.add_row("process, as this one", *(bytes_text(setup.process) for _ in shown))
    table.add_row(
        "at once", *(bytes_text(entry.peak + setup.process) for entry in shown), style="bold"
    )
    copies = (f"+ {bytes_text(entry.saving)}" for entry in shown)
    table.add_row("while a checkpoint is saved", *copies, style="dim")


def _traffic(setup: Setup, rows: int | None) -> RenderableType:
    """The collectives by phase, two lines each: what is moved, and what it serves."""
    found = phases(setup.collectives)
    sizes = _Sizes.of([row for phase in found for row in phase.rows[:rows]])
    head = sizes.line("per step", "calls", "collective", "because", "beside")
    lines: list[RenderableType] = [Text(head, "dim")]
    for phase in found:
        lines += _phase(phase, rows, sizes)
    total = sum(phase.bytes for phase in found)
    calls = sum(phase.count for phase in found)
    travel = f", in {setup.messages:,} messages" if setup.messages else ""
    lines.append(Text(sizes.line(bytes_text(total), count_text(calls), f"in all{travel}"), "bold"))
    return Group(*lines)


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Widths of the columns of collectives."""

    name: int
    why: int

    @classmethod
    def of(cls, rows: Sequence[Row]) -> _Sizes:
        """Those that hold all of `rows`."""
        names, whys = (
            [len(text) for text in found]
            for found in ([_name(r) for r in rows], [r.why for r in rows])
        )
        return cls(max(names, default=0) + 2, min(max(whys, default=0), 24))

    def line(self, size: str, calls: str, name: str, why: str = "", beside: str = "") -> str:
        """One line."""
        text = f"{size:>10}  {calls:>6}  {name:{self.name}}  {why:{self.why}}  {beside}"
        return text.rstrip()


def _name(row: Row) -> str:
    return f"{row.op} over {row.axis}"


def _phase(phase: Phase, rows: int | None, sizes: _Sizes) -> Iterator[RenderableType]:
    yield Text(sizes.line(bytes_text(phase.bytes), count_text(phase.count), phase.name), "bold")
    shown = len(phase.rows) if rows is None else rows
    for row in phase.rows[:shown]:
        cells = (bytes_text(row.bytes), count_text(row.count), f"  {_name(row)}", row.why)
        yield Text(sizes.line(*cells, hidden_text(row)), "yellow" if row.exposed else "")
        where = "  ".join(word for word in (row.modules, row.source) if word)
        if where:
            yield Padding(Text(where, "dim"), (0, 0, 0, 22), expand=False)
    rest = phase.rows[shown:]
    if rest:
        calls, size = sum(row.count for row in rest), sum(row.bytes for row in rest)
        yield Text(sizes.line(bytes_text(size), count_text(calls), f"  {len(rest)} smaller"), "dim")


def verify_table(verify: Mapping[str, Any]) -> RenderableType:
    """What a decoded `verify.json` says: each error against its law."""
    result = parse_verification(verify)
    table = plain_table("compared", ">worst relative error", ">law", "")
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
