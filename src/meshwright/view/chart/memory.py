"""Memory per rank as stacked bars in named parts; ranks with equal bills share a bar."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from meshwright.view.chart.bars import Part, stacked_bar
from meshwright.view.layouts import rank_names
from meshwright.view.runfile import RankMemory
from meshwright.view.svg import el, join, picture
from meshwright.view.units import bytes_text

__all__ = ["MOST_BARS", "equal_bills", "memory_chart", "part_class"]

MOST_BARS = 24
_ROW, _BAR = 34, 22
_KNOWN = ("weights", "gradients", "optimizer", "saved activations", "buffers")


def part_class(name: str) -> str:
    """The class that colours a part of memory; unknown parts share one."""
    return f"part-{name.replace(' ', '-')}" if name in _KNOWN else "part-rest"


def equal_bills(memory: Sequence[RankMemory]) -> tuple[tuple[str, RankMemory], ...]:
    """Ranks with the same parts named together, the neediest first."""
    groups: dict[tuple[tuple[str, int], ...], list[RankMemory]] = {}
    for entry in memory:
        groups.setdefault(entry.parts, []).append(entry)
    bills = [(rank_names([entry.rank for entry in group]), group[0]) for group in groups.values()]
    return tuple(sorted(bills, key=lambda bill: -bill[1].total))


def memory_chart(memory: Sequence[RankMemory], width: int) -> Markup:
    """A bar per group of equal ranks, at most 24."""
    bills = equal_bills(memory)[:MOST_BARS]
    if not bills:
        return Markup()
    full = bills[0][1].total
    narrow = width < 500
    row = _ROW + 14 if narrow else _ROW
    rows = [_row(bill, full, (index * row, width, narrow)) for index, bill in enumerate(bills)]
    return picture(width, row * len(bills) - 8, "Memory per rank", *rows)


def _row(bill: tuple[str, RankMemory], full: int, place: tuple[float, int, bool]) -> Markup:
    names, memory = bill
    y, width, narrow = place
    if narrow:
        left, top, space = 0, y + 16, width
        label_y = y + 11
    else:
        left, top, space = 96, y, width - 96 - 84
        label_y = y + 15
    label = names if len(names) < 16 else f"{names[:14]}…"
    parts = [
        Part(part_class(name), size, f"{names}: {name} {bytes_text(size)}", bytes_text(size))
        for name, size in memory.parts
        if size
    ]
    return join(
        [
            el("text", label, x=0, y=label_y, class_="row-label"),
            stacked_bar(parts, full, (left, top, space, _BAR)),
            el("text", bytes_text(memory.total), x=width, y=label_y, class_="total end"),
        ]
    )
