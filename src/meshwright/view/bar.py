"""Memory per rank as a bar of letters, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from rich.text import Text

from meshwright.view.chart.memory import equal_bills
from meshwright.view.runfile import Setup

__all__ = ["memory_bar"]

_MARKS = {
    "weights": ("W", "blue"),
    "gradients": ("G", "red"),
    "optimizer": ("O", "cyan"),
    "buffers": ("B", "magenta"),
    "saved activations": ("A", "yellow"),
    "working memory": ("M", "green"),
    "average": ("E", "bright_blue"),
    "older weights": ("V", "bright_cyan"),
    "communication buffers": ("C", "bright_red"),
    "batches": ("D", "bright_green"),
    "process": ("P", "dim"),
    "slack": (".", "dim"),
}
_OTHER = ("?", "dim")
_WIDTH, _MOST = 60, 3


def memory_bar(setup: Setup) -> Text:
    """A bar for each of the neediest ranks, each letter as many bytes; and what letters are."""
    bills = equal_bills(setup.memory)[:_MOST]
    bars = []
    for names, entry in bills:
        process = (("process", setup.process),) if setup.process else ()
        bars.append((names, (*entry.parts, *entry.beside, *process)))
    full = max((sum(size for _, size in parts) for _, parts in bars), default=0) or 1
    found = Text()
    for names, parts in bars:
        for (name, _), count in zip(parts, _cells([size for _, size in parts], full), strict=True):
            mark, style = _MARKS.get(name, _OTHER)
            found.append(mark * count, style)
        found.append(f"  {names}\n")
    shown = dict.fromkeys(name for _, parts in bars for name, size in parts if size)
    legend = (f"{_MARKS.get(name, _OTHER)[0]} {name}" for name in shown)
    return found.append("  ".join(legend), "dim")


def _cells(sizes: Sequence[int], full: int) -> list[int]:
    """How many letters each part has, so that together they are as long as their sum."""
    ends = [0, *(round(_WIDTH * end / full) for end in accumulate(sizes))]
    return [after - before for before, after in pairwise(ends)]
