"""`mw plan`: what a plan makes each rank hold and send, worked out in this process alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.text import Text

from meshwright.cli.output import log, print_json, show, user_output
from meshwright.cli.told import Task
from meshwright.cli.words import (
    AsJson,
    File,
    Memory,
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
from meshwright.job import Job
from meshwright.plan.plan import Plan
from meshwright.plan.size import parse_bytes

__all__ = ["EXAMPLE", "explained", "plan"]

EXAMPLE = "Example:  mw plan examples/gpt.py --plan tensor=2,data=2 --explain"


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What was asked for."""

    which: Which
    plan: str | None
    ranks: int | None
    explain: bool
    max_bytes: str | None
    memory: str | None
    json: bool
    measure: bool


def plan(
    file: File,
    *,
    plan: PlanText = None,
    n: Ranks = None,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            help="Every collective and why, the mesh, a block, every parameter, what was lost.",
        ),
    ] = False,
    max_bytes: Annotated[
        str | None,
        typer.Option(
            "--max-bytes",
            metavar="SIZE",
            help="Fail if a rank moves more in a step, such as [bold]2MiB[/].",
            show_default=False,
        ),
    ] = None,
    memory: Memory = None,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Cut the pipeline by what a micro-batch takes here, which holds the whole model.",
        ),
    ] = False,
    seed: Seed = None,
    settings: Settings = None,
    json: AsJson = False,
) -> Task:
    """Explain a plan: layouts, collectives with bytes and source lines, memory per rank."""
    which = Which(file, tuple(settings or ()), seed)
    return partial(_plan, _Wanted(which, plan, n, explain, max_bytes, memory, json, measure))


def _plan(wanted: _Wanted) -> int:
    from meshwright.launch.contract import here
    from meshwright.view.limits import require_limits

    if here().world.size > 1:
        raise UsageError("mw plan needs no ranks: it works every rank out in one process")
    max_bytes, memory = _size("--max-bytes", wanted.max_bytes), _size("--memory", wanted.memory)
    with user_output(aside=wanted.json):
        job, laid, record = _laid_out(
            wanted.which, wanted.plan, wanted.ranks, measure=wanted.measure
        )
    if wanted.json:
        print_json(record)
    with user_output(aside=True):
        require_limits(job, laid, record, max_bytes=max_bytes, memory=memory)
    if not wanted.json:
        for phase, found in (record.get("phases") or {"": record}).items():
            show(*_named(phase), *_shown({**record, **found}, everything=wanted.explain))
    return 0


def _size(flag: str, text: str | None) -> int | None:
    return None if text is None else parse_bytes(text, flag)


def explained(which: Which, given: str | None, n: int | None) -> dict[str, Any]:
    """The plan laid out, as run.json has it.

    Args:
        which: job.
        given: the plan's text.
        n: ranks; by default what the plan names.
    """
    return _laid_out(which, given, n)[2]


def _laid_out(
    which: Which, given: str | None, n: int | None, *, measure: bool = False
) -> tuple[Job, Plan, dict[str, Any]]:
    """The job, the plan that was asked for or chosen, and what it means."""
    from meshwright import api
    from meshwright.plan.toml import to_toml
    from meshwright.run.clocked import clocked

    text = plan_text(given)
    asked = read_plan(text)
    ranks = n or (1 if asked is None else asked.ranks)
    require_world(asked, ranks)
    job = which.load()
    laid = api.plan_of(text, job, ranks)
    if asked is None:
        log(f"auto takes {laid.text()}: its state fits this host's memory; time was not compared")
    told: dict[str, Any] = {"file": which.path, "name": which.name}
    if measure:
        found = clocked(job, laid)
        laid = found.plan
        told["measured"] = {"seconds": list(found.seconds), "toml": to_toml(laid)}
    return job, laid, {**told, **api.explain(job, laid)}


def _shown(record: Mapping[str, Any], *, everything: bool) -> Iterator[RenderableType]:
    from meshwright.view.explained import explained as all_of_it
    from meshwright.view.explained import fallback_table
    from meshwright.view.runfile import parse_setup
    from meshwright.view.tables import plan_table

    if everything:
        yield plan_table(record, rows=None)
        yield all_of_it(record)
        return
    yield plan_table(record)
    if record["fallbacks"]:
        yield Text()
        yield fallback_table(parse_setup(record).fallbacks)
    if record["optimizer"]["gathered"]:
        yield Text()
        yield Text(_gathered(record["optimizer"]))
    if measured := record.get("measured"):
        yield Text()
        yield Text(_measured(measured["seconds"]))
        yield Text(measured["toml"].strip(), "cyan")
    yield Text("\n--explain adds every collective, the mesh, a block and all parameters", "dim")


def _named(phase: str) -> Iterator[RenderableType]:
    """Which of a job's phases is told next."""
    if phase:
        yield Text(f"phase {phase}", "bold")


def _gathered(optimizer: Mapping[str, Any]) -> str:
    """Which parameters the optimizer's step needs whole, and why."""
    count = f"{optimizer['gathered']} of {optimizer['jointly']}"
    why = "".join(f"\n  {reason}" for reason in optimizer["because"])
    told = f"; its step could not be traced:{why}" if why else ""
    return f"{optimizer['class']} steps {count} split parameters whole, gathered each step{told}"


def _measured(seconds: Sequence[float]) -> str:
    """`a micro-batch takes the stages 1.20, 1.30 ms here; the plan with these cuts, as a file:`."""
    from meshwright.view.units import seconds_text

    told = ", ".join(map(seconds_text, seconds))
    return f"a micro-batch takes the stages {told} here; the plan with these cuts, as a file:"
