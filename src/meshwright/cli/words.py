"""Words that several verbs take, and what they mean together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Final

import typer

from meshwright.errors import UsageError
from meshwright.job import Job
from meshwright.plan.check import Facts, require
from meshwright.plan.plan import Plan
from meshwright.plan.toml import parse_plan

__all__ = [
    "AsJson",
    "File",
    "Memory",
    "PlanText",
    "Ranks",
    "RunDir",
    "Seed",
    "Settings",
    "Timeout",
    "Which",
    "flags",
    "plan_text",
    "read_plan",
    "require_room",
    "require_world",
]

RANKS_PER_CORE: Final = 16

File = Annotated[
    str,
    typer.Argument(
        metavar="FILE[:NAME]",
        help="Python file, and the Job or function returning one in it; NAME is [bold]job[/] "
        "when left out.",
        show_default=False,
    ),
]
PlanText = Annotated[
    str | None,
    typer.Option(
        "--plan",
        "-p",
        metavar="PLAN",
        help="Such as [bold]zero3,data=2,microbatches=4[/], [bold]auto[/] or a TOML file.",
        show_default="auto",
    ),
]
Ranks = Annotated[
    int | None,
    typer.Option("-n", min=1, metavar="N", help="How many ranks.", show_default="what PLAN names"),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="A parameter of the function that makes the job; may be given again.",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option("--seed", min=0, metavar="S", help="In place of the job's.", show_default=False),
]
RunDir = Annotated[
    Path | None,
    typer.Option(
        "--run-dir",
        metavar="D",
        help="The run's folder; goes on from what is in it.",
        show_default="runs/FILE-NNN",
    ),
]
Timeout = Annotated[
    float | None,
    typer.Option(
        "--timeout",
        min=0.1,
        metavar="SECONDS",
        help="Of every wait of the ranks on each other.",
        show_default="1800, then 300",
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        metavar="SIZE",
        help="Fail if a rank needs more, and say what would fit.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@dataclass(frozen=True, slots=True)
class Which:
    """Which job: the file, the settings of its function, the seed."""

    file: str
    settings: tuple[str, ...] = ()
    seed: int | None = None

    @property
    def path(self) -> str:
        """The file alone."""
        from meshwright.launch.userfile import locate

        return str(locate(self.file)[0])

    @property
    def name(self) -> str:
        """The name in it."""
        from meshwright.launch.userfile import locate

        return locate(self.file)[1]

    def load(self) -> Job:
        """The job."""
        from meshwright.launch.userfile import load_job

        job = load_job(self.file, self.settings)
        return job if self.seed is None else replace(job, seed=self.seed)

    def words(self) -> list[str]:
        """The words that say this again."""
        found = [self.file]
        for setting in self.settings:
            found += ["--set", setting]
        if self.seed is not None:
            found += ["--seed", str(self.seed)]
        return found


def plan_text(given: str | None) -> str:
    """The plan that was asked for, here or by MESHWRIGHT_PLAN.

    Raises:
        UsageError: both are there and differ.
    """
    ambient = os.environ.get("MESHWRIGHT_PLAN")
    if given and ambient and given != ambient:
        raise UsageError(
            f"--plan {given}, but MESHWRIGHT_PLAN is {ambient!r} in the environment; "
            "unset it, or leave --plan out"
        )
    return given or ambient or "auto"


def read_plan(text: str) -> Plan | None:
    """The plan; None where it is still to be chosen."""
    found = parse_plan(text, lambda path: Path(path).read_text(encoding="utf-8"))
    return found if isinstance(found, Plan) else None


def require_world(plan: Plan | None, ranks: int) -> None:
    """Refuse a plan that does not fit the ranks before any is started.

    Raises:
        PlanError: with every reason.
    """
    if plan is not None:
        require(plan.filled(ranks), Facts(ranks))


def require_room(ranks: int) -> None:
    """Refuse to start more processes here than any training can want: a slip of the finger.

    Raises:
        UsageError: with how many can be started.
    """
    cores = len(os.sched_getaffinity(0))
    most = RANKS_PER_CORE * cores
    if ranks > most:
        raise UsageError(
            f"{ranks:,} ranks on this host of {cores} core{'s' * (cores != 1)}; start at most "
            f"{most} ({RANKS_PER_CORE} a core), or start them on more hosts with torchrun"
        )


def flags(**given: object) -> Sequence[str]:
    """`--name value` for what is given; a flag alone for True, nothing for None and False."""
    found: list[str] = []
    for name, value in given.items():
        if value is not None and value is not False:
            found.append("--" + name.replace("_", "-"))
            if value is not True:
                found.append(str(value))
    return found
