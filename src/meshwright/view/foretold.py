"""The memory bill of a run beside what was measured, as a terminal table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from meshwright.view.measured import compared
from meshwright.view.tables import plain_table
from meshwright.view.units import bytes_text

__all__ = ["measured_table"]

_SHOWN = 3


def measured_table(run: Mapping[str, Any]) -> RenderableType | None:
    """The bill beside what was measured, of the ranks that held most; None without any."""
    ranks = compared(run)
    if not ranks:
        return None
    shown = ranks[:_SHOWN]
    titles = (f">{word}" for one in shown for word in (f"rank {one.rank}: bill", "measured"))
    table = plain_table("memory", *titles)
    for name in dict.fromkeys(name for one in shown for name, _, _ in one.rows):
        each = [{row: pair for row, *pair in one.rows}.get(name, [0, 0]) for one in shown]
        table.add_row(Text(name), *(_size(size) for pair in each for size in pair))
    totals = (bytes_text(size) for one in shown for size in (one.bill, one.peak))
    table.add_row("at once", *totals, style="bold")
    differences = (cell for one in shown for cell in ("", f"{one.difference * 100:+.1f} %"))
    table.add_row("difference", *differences)
    if len(ranks) > _SHOWN:
        return Group(table, Text(f"and {len(ranks) - _SHOWN} more ranks, which held less", "dim"))
    return table


def _size(size: int) -> str:
    """Bytes; rounding may leave a little less than nothing."""
    return bytes_text(size) if size >= 0 else f"-{bytes_text(-size)}"
