"""Tables: for the terminal as they come, and in Markdown for the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.markup import escape
from rich.table import Table

from benchmarks.harness.result import FAILED, Result, ratio
from benchmarks.harness.statistics import HOLDS, MISSES, OPEN

COLOURS = {HOLDS: "green", MISSES: "red", OPEN: "yellow", FAILED: "magenta"}
HEADS = ("", "ours", "other", "limit", "ratio", "95 % interval", "target", "verdict")


def cells(result: Result) -> tuple[str, ...]:
    """A line of the table."""
    found = result.found
    return (
        result.what,
        result.ours,
        result.peer,
        result.limit,
        "" if found is None else ratio(found.median),
        result.interval,
        result.bound,
        result.verdict,
    )


def on_terminal(title: str, results: Sequence[Result]) -> Table:
    """A table as a group is done."""
    table = Table(title=title, title_justify="left")
    for head in HEADS:
        table.add_column(head, justify="left" if head in ("", "verdict") else "right")
    for result in results:
        *most, verdict = cells(result)
        colour = COLOURS[result.verdict]
        table.add_row(*most, f"[{colour}]{verdict}[/]")
        if result.reason:
            table.add_row(f"  {escape(result.reason)}")
    return table


def in_markdown(results: Sequence[Result], notes: Mapping[str, str]) -> str:
    """A section's table, with the reasons and notes of its lines below it."""
    rows = [HEADS, ("---", *["---:"] * (len(HEADS) - 2), "---")]
    rows += [(*cells(r)[:-1], _emphasised(r.verdict)) for r in results]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    remarks = [f"- {r.what}: {r.reason}" for r in results if r.reason]
    remarks += [f"- **{r.what}.** {notes[r.key].strip()}" for r in results if r.key in notes]
    return "\n\n".join([table, *(["\n".join(remarks)] if remarks else [])])


def tally(results: Sequence[Result]) -> str:
    """How many hold."""
    counts = {said: sum(r.verdict == said for r in results) for said in COLOURS}
    return ", ".join(f"{count} {said}" for said, count in counts.items() if count) or "no line"


def rounds(results: Sequence[Result]) -> str:
    """How many values are behind the ratios."""
    found = sorted({r.found.n for r in results if r.found and not math.isnan(r.found.median)})
    if not found:
        return "no rounds"
    return f"{found[0]} rounds" if len(found) == 1 else f"{found[0]} to {found[-1]} rounds"


def _emphasised(verdict: str) -> str:
    return verdict if verdict == HOLDS else f"**{verdict}**"
