"""What a training came to, in a few lines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from meshwright.cli.output import program
from meshwright.view.units import value_text

__all__ = ["measured_text", "summary_text"]


def measured_text(summary: Mapping[str, Any]) -> list[RenderableType]:
    """The memory bill beside what was measured, where the run has both."""
    from meshwright.view.folder import read_record
    from meshwright.view.foretold import measured_table

    table = measured_table(read_record(Path(summary["run_dir"])))
    return [] if table is None else [Text(), table]


def summary_text(summary: Mapping[str, Any]) -> Table:
    """The summary that `train` returns, and where to look next."""
    ranks, folder = summary["ranks"], summary["run_dir"]
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column()
    taken = f"{summary['steps']:,} on {ranks} rank{'s' * (ranks != 1)} under {summary['plan']}"
    table.add_row("steps", Text(taken))
    losses = summary.get("losses", {})
    for phase, loss in losses.items():
        table.add_row(f"loss of {phase}", value_text(float(loss)))
    if summary["loss"] is not None and not losses:
        table.add_row("loss", value_text(float(summary["loss"])))
    if summary["evaluation"]:
        found = (f"{name} {value_text(v)}" for name, v in summary["evaluation"].items())
        table.add_row("held-out", Text("  ".join(found)))
    table.add_row("run", Text(folder))
    table.add_row("report", Text(f"{program()} report {folder}", "bold"))
    return table
