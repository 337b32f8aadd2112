"""`mw plan`: what a plan makes each rank hold and send, worked out in this process alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from meshwright.cli.output import log, print_json, show, user_output
from meshwright.cli.told import Task
from meshwright.cli.words import (
    AsJson,
    File,
    PlanText,
    Ranks,
    Seed,
    Settings,
    Which,
    plan_text,
    read_plan,
    require_world,
)
from meshwright.errors import UsageError

__all__ = ["EXAMPLE", "explained", "plan"]

EXAMPLE = "Example:  mw plan examples/gpt.py --plan zero3 -n 4"


def plan(
    file: File,
    *,
    plan: PlanText = None,
    n: Ranks = None,
    seed: Seed = None,
    settings: Settings = None,
    json: AsJson = False,
) -> Task:
    """Explain a plan: layouts, collectives with bytes and source lines, memory per rank."""
    which = Which(file, tuple(settings or ()), seed)
    return partial(_plan, which, plan, n, json)


def _plan(which: Which, given: str | None, n: int | None, json: bool) -> int:
    from meshwright.launch.contract import here
    from meshwright.view.tables import plan_table

    if here().world.size > 1:
        raise UsageError("mw plan needs no ranks: it works every rank out in one process")
    with user_output(aside=json):
        record = explained(which, given, n)
    if json:
        print_json(record)
    else:
        show(plan_table(record, rows=None), *_more(record))
    return 0


def explained(which: Which, given: str | None, n: int | None) -> dict[str, Any]:
    """The plan laid out, as run.json has it.

    Args:
        which: job.
        given: the plan's text.
        n: ranks; by default what the plan names.
    """
    from meshwright import api
    from meshwright.run.describe import explain

    text = plan_text(given)
    asked = read_plan(text)
    ranks = n or (1 if asked is None else asked.ranks)
    require_world(asked, ranks)
    job = which.load()
    laid = api.plan_of(text, job, ranks)
    if asked is None:
        log(f"auto takes {laid.text()}: its state fits this host's memory; time was not compared")
    return {"file": which.path, "name": which.name, **explain(job, laid, ranks)}


def _more(record: Mapping[str, Any]) -> list[RenderableType]:
    """The parameters one by one, and the ops that no rule knows."""
    parts: list[RenderableType] = [Text(), _parameters(record["parameters"])]
    if record["fallbacks"]:
        parts += [Text(), _fallbacks(record["fallbacks"])]
    return parts


def _parameters(parameters: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for title in ("parameter", "shape", "weights", "gradients", "optimizer"):
        table.add_column(title)
    for parameter in parameters:
        shape = " × ".join(map(str, parameter["shape"])) or "scalar"
        layouts = (parameter[kind] or "none" for kind in ("weights", "gradients", "optimizer"))
        table.add_row(Text(parameter["name"]), shape, *map(Text, layouts))
    return table


def _fallbacks(fallbacks: Sequence[Mapping[str, str]]) -> Table:
    """Ops without a rule: every rank gathers their operands and computes all of them."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for title in ("computed whole on every rank", "source", "module"):
        table.add_column(title)
    for op in fallbacks:
        table.add_row(Text(op["op"], "yellow"), Text(op["source"]), Text(op["module"]))
    return table
