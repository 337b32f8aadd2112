"""`mw verify`: a plan's numbers against those of the same code on one device."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from meshwright.cli.output import print_json, show, user_output, write_json
from meshwright.cli.told import Task
from meshwright.cli.words import (
    AsJson,
    File,
    PlanText,
    Seed,
    Settings,
    Timeout,
    Which,
    flags,
    plan_text,
    read_plan,
    require_room,
    require_world,
)
from meshwright.errors import UsageError, VerificationFailed

__all__ = ["EXAMPLE", "failure_text", "verify"]

EXAMPLE = "Example:  mw verify examples/gpt.py --plan zero3,data=2 --set depth=1"


class Dtype(StrEnum):
    """In which both sides compute."""

    float64 = "float64"
    float32 = "float32"


class Where(StrEnum):
    """What a rank is."""

    local = "local"
    processes = "processes"


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What was asked for."""

    which: Which
    plan: str | None
    ranks: int | None
    where: Where
    steps: int
    dtype: Dtype
    run_dir: Path | None
    timeout: float | None
    json: bool

    def words(self) -> list[str]:
        """The words that say this to a rank."""
        return [
            "verify",
            *self.which.words(),
            *flags(
                plan=self.plan,
                steps=self.steps,
                dtype=self.dtype.value,
                ranks=self.where.value,
                run_dir=self.run_dir,
                json=self.json,
            ),
        ]


def verify(
    file: File,
    *,
    plan: PlanText = None,
    n: Annotated[
        int | None,
        typer.Option(
            "-n", min=1, metavar="N", help="How many ranks.", show_default="what PLAN names, else 2"
        ),
    ] = None,
    ranks: Annotated[
        Where, typer.Option("--ranks", help="In one thread, or each a process.")
    ] = Where.local,
    steps: Annotated[
        int, typer.Option(min=1, metavar="K", help="Each with a batch of its own.")
    ] = 5,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="Of both sides.")] = Dtype.float64,
    seed: Seed = None,
    settings: Settings = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(
            "--run-dir",
            metavar="D",
            help="A run whose report is to show the result.",
            show_default=False,
        ),
    ] = None,
    timeout: Timeout = None,
    json: AsJson = False,
) -> Task:
    """Compare every tensor under a plan with the same code on one device."""
    which = Which(file, tuple(settings or ()), seed)
    return partial(_verify, _Wanted(which, plan, n, ranks, steps, dtype, run_dir, timeout, json))


def _verify(wanted: _Wanted) -> int:
    from meshwright.launch.contract import here

    text = plan_text(wanted.plan)
    plan = read_plan(text)
    if wanted.run_dir is not None and not wanted.run_dir.is_dir():
        raise UsageError(
            f"--run-dir {wanted.run_dir} is not a folder; name a run's, or leave it out"
        )
    if here().world.size > 1:
        return _run(wanted, text, None)
    asked = 1 if plan is None else plan.ranks
    ranks = wanted.ranks or (2 * asked if plan is None or plan.fills else asked)
    require_world(plan, ranks)
    Path(wanted.which.path)  # raises before any rank is started
    if wanted.where is Where.processes and ranks > 1:
        require_room(ranks)
        return _start(wanted, text, ranks)
    return _run(wanted, text, ranks)


def _start(wanted: _Wanted, text: str, ranks: int) -> int:
    """Start the ranks; their logs are kept only where something else than the numbers failed."""
    from meshwright.launch.local import launch

    logs = Path(tempfile.mkdtemp(prefix="meshwright-verify-"))
    status = launch(
        ranks,
        [sys.executable, "-P", "-m", "meshwright", *wanted.words()],
        run_dir=logs,
        plan=None if text == "auto" else text,
        timeout=wanted.timeout,
    )
    if status in (0, VerificationFailed.exit_status):
        shutil.rmtree(logs, ignore_errors=True)
    return status


def _run(wanted: _Wanted, plan: str, ranks: int | None) -> int:
    """Verify in this process; rank 0 prints the result, and every rank fails with it."""
    from meshwright import api
    from meshwright.launch.contract import here
    from meshwright.view.tables import verify_table

    with user_output(aside=wanted.json):
        found = api.verify(
            wanted.which.load(), plan, steps=wanted.steps, ranks=ranks, dtype=wanted.dtype.value
        )
    if here().world.rank == 0:
        if wanted.run_dir is not None:
            write_json(wanted.run_dir / "verify.json", found)
        if wanted.json:
            print_json(found)
        else:
            show(verify_table(found))
    if not found["passed"]:
        raise VerificationFailed(failure_text(found))
    return 0


def failure_text(found: Mapping[str, Any]) -> str:
    """Which tensor differs most, and at which op the ranks first differ, where that is known."""
    errors, law = found["worst_relative_error"], found["law"]
    kind = max(law, key=lambda k: _over(errors[k], law[k]))
    text = (
        f"plan {found['plan']} on {found['ranks']} ranks differs from one device: {kind} of "
        f"{found['worst_tensor']} by {errors[kind]:.1e}, but the law is {law[kind]:.0e}"
    )
    first = found.get("first_difference")
    if first:
        from meshwright.run.describe import nearby

        where = " in ".join(word for word in (nearby(first["source"]), first["module"]) if word)
        text += f"\nthe first op that differs is {first['op']} ({first['phase']}) at {where}"
    return text


def _over(error: float, law: float) -> float:
    """How many times over its law an error is; one that is no number is the furthest."""
    if error != error:
        return float("inf")
    return error / law if law else error
