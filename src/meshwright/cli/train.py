"""`mw train`: train the job in a file, in this process or in ranks of its own."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from meshwright.cli.output import log, print_json, show, user_output
from meshwright.cli.summary import measured_text, summary_text
from meshwright.cli.told import Task, attempt
from meshwright.cli.words import (
    AsJson,
    File,
    Memory,
    PlanText,
    Ranks,
    RunDir,
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
from meshwright.errors import UsageError
from meshwright.launch.collector import seldom
from meshwright.plan.size import parse_bytes

__all__ = ["EXAMPLE", "spelled_out", "train"]

EXAMPLE = "Example:  mw train examples/gpt.py -n 2 --plan zero3 --steps 200 --set depth=4"

_USUAL = "auto"
"""The steps that `--trace` alone traces."""


def spelled_out(words: Sequence[str]) -> list[str]:
    """The words of `mw train`, `--trace` with its value: typer has no value to be left out."""
    found: list[str] = []
    for word, following in zip(words, [*words[1:], ""], strict=True):
        found.append(word)
        if word == "--trace" and not (following[:1].isdecimal() or following == _USUAL):
            found.append(_USUAL)
    return found


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What was asked for."""

    which: Which
    plan: str | None
    ranks: int | None
    steps: int | None
    evaluate_every: int | None
    checkpoint_every: int | None
    wait_for_saves: bool
    run_dir: Path | None
    resume: bool
    fresh: bool
    overwrite: bool
    timeout: float | None
    eager: bool
    compiled: bool
    trace: str | None
    memory: str | None
    json: bool

    def words(self) -> list[str]:
        """The words that say what to train; not with how many ranks, nor in which folder."""
        return [
            "train",
            *self.which.words(),
            *flags(
                plan=self.plan,
                steps=self.steps,
                evaluate_every=self.evaluate_every,
                checkpoint_every=self.checkpoint_every,
                wait_for_saves=self.wait_for_saves,
                eager=self.eager,
                compile=self.compiled,
                trace=self.trace,
            ),
        ]


def train(
    file: File,
    *,
    n: Ranks = None,
    plan: PlanText = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, metavar="K", help="In all.", show_default="the job's"),
    ] = None,
    seed: Seed = None,
    settings: Settings = None,
    run_dir: RunDir = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the newest run.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start anew; a folder that is not empty is refused.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="With --fresh: lose what is in the folder.")
    ] = False,
    evaluate_every: Annotated[
        int | None,
        typer.Option(min=1, metavar="K", help="Steps between evaluations.", show_default="last"),
    ] = None,
    checkpoint_every: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="K", help="Steps between checkpoints.", show_default="10 minutes"
        ),
    ] = None,
    wait_for_saves: Annotated[
        bool,
        typer.Option("--wait-for-saves", help="Stand still until a checkpoint is on the disk."),
    ] = False,
    timeout: Timeout = None,
    eager: Annotated[
        bool, typer.Option("--eager", help="Run the code as ordinary PyTorch, untraced.")
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile what was traced; needs a C++ compiler.")
    ] = False,
    trace: Annotated[
        str | None,
        typer.Option(
            "--trace",
            metavar="STEPS",
            help="Trace steps, such as [bold]3-7[/], for Perfetto and the report; without STEPS "
            "five, after two to warm up.",
            show_default=False,
        ),
    ] = None,
    memory: Memory = None,
    json: AsJson = False,
) -> Task:
    """Train the job in FILE."""
    wanted = _Wanted(
        Which(file, tuple(settings or ()), seed),
        plan,
        n,
        steps,
        evaluate_every,
        checkpoint_every,
        wait_for_saves,
        run_dir,
        resume,
        fresh,
        overwrite,
        timeout,
        eager,
        compiled,
        trace,
        memory,
        json,
    )
    return partial(_train, wanted)


def _train(wanted: _Wanted) -> int:
    from meshwright.launch.contract import here
    from meshwright.run.folder import choose
    from meshwright.run.observe.window import parse_steps

    contract = here()
    if wanted.trace not in (None, _USUAL):
        parse_steps(wanted.trace)
    path = Path(wanted.which.path)
    text = plan_text(wanted.plan)
    plan = read_plan(text)
    if contract.world.size > 1:  # this process is a rank already
        if wanted.ranks not in (None, contract.world.size):
            raise UsageError(
                f"-n {wanted.ranks}, but {contract.engine} started {contract.world.size} ranks; "
                "leave -n out"
            )
        _require_memory(wanted, text, contract.world.size)
        folder = {"run_dir": wanted.run_dir, "resume": wanted.resume}
        folder |= {"fresh": wanted.fresh, "overwrite": wanted.overwrite}
        return _run(wanted, text, contract.world.size, folder)
    ranks = wanted.ranks or (1 if plan is None else plan.ranks)
    require_world(plan, ranks)
    require_room(ranks)
    _require_memory(wanted, text, ranks)
    choice = choose(
        path.stem,
        run_dir=wanted.run_dir or contract.run_dir,
        resume=wanted.resume,
        fresh=wanted.fresh,
        overwrite=wanted.overwrite,
    )
    if ranks == 1:
        folder = {"run_dir": choice.path, "resume": wanted.resume}
        return attempt(partial(_run, wanted, text, 1, folder), choice.path)
    log(f"{wanted.which.file} on {ranks} ranks, plan {text}, run folder {choice.path}")
    return _start(wanted, text, ranks, choice.path)


def _require_memory(wanted: _Wanted, plan: str, ranks: int) -> None:
    """Refuse a plan that needs more than `--memory` on a rank, before any is started.

    Raises:
        PlanError: with what is needed, largest first, and what would fit.
    """
    from meshwright import api

    if wanted.memory is None:
        return
    if wanted.eager:
        raise UsageError(
            "--memory is worked out from what was traced, and --eager traces nothing; leave one of "
            "them out"
        )
    with user_output(aside=True):
        limit = parse_bytes(wanted.memory, "--memory")
        api.explain(wanted.which.load(), plan, ranks=ranks, memory=limit)


def _start(wanted: _Wanted, text: str, ranks: int, run_dir: Path) -> int:
    """Start the ranks, each with the same words, and wait for them."""
    from meshwright.launch.local import launch

    words = [*wanted.words(), *flags(run_dir=run_dir, resume=wanted.resume, json=wanted.json)]
    return launch(
        ranks,
        [sys.executable, "-P", "-m", "meshwright", *words],
        run_dir=run_dir,
        plan=None if text == "auto" else text,
        timeout=wanted.timeout,
    )


def _run(wanted: _Wanted, plan: str, ranks: int, folder: Mapping[str, Any]) -> int:
    """Train in this process, which is the only rank or one of several; rank 0 prints the result."""
    settled = seldom()
    try:
        summary = _trained(wanted, plan, ranks, folder, settled)
    finally:
        settled()
    from meshwright.launch.contract import here

    if here().world.rank == 0:
        if wanted.json:
            print_json(summary)
        else:
            log("")
            show(summary_text(summary), *measured_text(summary))
    return 0


def _trained(
    wanted: _Wanted,
    plan: str,
    ranks: int,
    folder: Mapping[str, Any],
    settled: Callable[[], None],
) -> dict[str, Any]:
    """Train; `settled` is called once a step is done."""
    from meshwright import api

    with user_output(aside=wanted.json):
        found: dict[str, Any] = api.train(
            wanted.which.load(),
            wanted.steps,
            plan,
            evaluate_every=wanted.evaluate_every,
            checkpoint_every=wanted.checkpoint_every,
            wait_for_saves=wanted.wait_for_saves,
            eager=wanted.eager,
            compile=wanted.compiled,
            trace=wanted.trace == _USUAL or wanted.trace or False,
            on_step=[lambda _run, _metrics: settled()],
            info=_info(wanted, ranks),
            **folder,
        )
    return found


def _info(wanted: _Wanted, ranks: int) -> dict[str, Any]:
    """What run.json says of the command."""
    verb, *rest = wanted.words()
    file, *options = rest
    several = ["-n", str(ranks)] if ranks > 1 else []
    return {
        "file": wanted.which.path,
        "name": wanted.which.name,
        "command": shlex.join(["mw", verb, file, *several, *options]),
    }
