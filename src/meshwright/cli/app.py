"""The verbs put together, and how a command ends: its result's status, or an error's."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Annotated

import typer

from meshwright import __version__
from meshwright.cli import checkpoint, deepspeed, demo, env, launch, plan, report, train, verify
from meshwright.cli.told import Task, attempt

__all__ = ["app", "main"]

app = typer.Typer(
    name="mw",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train", epilog=train.EXAMPLE)(train.train)
app.command("verify", epilog=verify.EXAMPLE)(verify.verify)
app.command("plan", epilog=plan.EXAMPLE)(plan.plan)
app.command("launch", epilog=launch.EXAMPLE)(launch.launch)
app.add_typer(checkpoint.app, name="checkpoint")
app.command("deepspeed", epilog=deepspeed.EXAMPLE)(deepspeed.deepspeed)
app.command("report", epilog=report.EXAMPLE)(report.report)
app.command("demo", epilog=demo.EXAMPLE)(demo.demo)
app.command("env", epilog=env.EXAMPLE)(env.env)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"meshwright {__version__}")
        raise typer.Exit


@app.callback()
def _mw(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_show_version, help="Print the version and end."
        ),
    ] = False,
) -> None:
    """Write the model for one device; Meshwright lays it over the devices you have."""


def main(words: Sequence[str] | None = None) -> int:
    """Run the command that `words` (by default the process's arguments) say; its exit status."""
    words = list(sys.argv[1:] if words is None else words)
    if words[:1] == ["train"]:
        words = train.spelled_out(words)
    command = typer.main.get_command(app)
    try:
        task = command.main(args=words or ["--help"], prog_name="mw", standalone_mode=False)
    except typer.TyperException as error:  # what was typed is no command
        print(f"mw: {error.format_message()}", file=sys.stderr)
        return 2
    return attempt(partial(_printed, task)) if callable(task) else int(task or 0)


def _printed(task: Task) -> int:
    """Do the work, and print all of what it has to say."""
    status = task()
    sys.stdout.flush()
    return status
