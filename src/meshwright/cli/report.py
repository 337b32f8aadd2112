"""`mw report`: a run's page."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from meshwright.cli.output import print_json
from meshwright.cli.told import Task
from meshwright.cli.words import AsJson

__all__ = ["EXAMPLE", "report"]

EXAMPLE = "Example:  mw report runs/gpt-001"


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")],
    *,
    json: AsJson = False,
) -> Task:
    """Write RUN/report.html, one self-contained page about a run, and print where it is."""
    return partial(_report, run, json)


def _report(run: Path, json: bool) -> int:
    from meshwright.view.report import write_report

    path = write_report(run)
    if json:
        print_json({"report": str(path)})
    else:
        print(path)
    return 0
