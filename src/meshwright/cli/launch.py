"""`mw launch`: N ranks of a script that has a loop of its own."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from meshwright.cli.told import Task
from meshwright.cli.words import RunDir, Timeout, plan_text, read_plan, require_room, require_world
from meshwright.errors import UsageError

__all__ = ["EXAMPLE", "launch"]

EXAMPLE = "Example:  mw launch -n 2 --plan zero2 -- python train.py --epochs 3"


def launch(
    command: Annotated[
        list[str],
        typer.Argument(metavar="-- COMMAND...", help="What every rank runs.", show_default=False),
    ],
    *,
    n: Annotated[int, typer.Option("-n", min=1, metavar="N", help="How many ranks.")],
    plan: Annotated[
        str | None,
        typer.Option(
            "--plan", "-p", metavar="PLAN", help="In place of the script's.", show_default=False
        ),
    ] = None,
    run_dir: RunDir = None,
    timeout: Timeout = None,
) -> Task:
    """Start N ranks of COMMAND on this host; rank 0's output is this command's."""
    return partial(_launch, tuple(command), n, plan, run_dir, timeout)


def _launch(
    command: tuple[str, ...], n: int, plan: str | None, run_dir: Path | None, timeout: float | None
) -> int:
    from meshwright.launch.contract import here
    from meshwright.launch.local import launch as start
    from meshwright.run.folder import choose

    contract = here()
    if contract.world.size > 1:
        raise UsageError(f"this is rank {contract.world.rank} of a world already; start one world")
    text = plan_text(plan)
    require_world(read_plan(text), n)
    require_room(n)
    choice = choose(_stem(command), run_dir=run_dir or contract.run_dir)
    chosen = None if text == "auto" else text
    return start(n, command, run_dir=choice.path, plan=chosen, timeout=timeout)


def _stem(command: tuple[str, ...]) -> str:
    """A name for the run: the script's, where one is named."""
    script = next((word for word in command if word.endswith(".py")), command[0])
    return Path(script).stem
