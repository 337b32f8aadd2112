"""`mw demo`: plan, train on two processes, prove the numbers, and show the report."""

from __future__ import annotations

import sys
from functools import partial
from math import prod
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.console import Console, Group
from rich.constrain import Constrain
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from meshwright.cli.output import program, show, write_json
from meshwright.cli.plan import explained
from meshwright.cli.told import Task
from meshwright.cli.verify import failure_text
from meshwright.cli.words import Which
from meshwright.errors import UsageError, VerificationFailed
from meshwright.view.units import bytes_text

__all__ = ["EXAMPLE", "demo"]

EXAMPLE = "Example:  mw demo"

PLAN: Final = "zero3,data=2"
RANKS: Final = 2
SETTINGS: Final = ("depth=3", "width=96", "context=96", "batch=32", "lr=0.002")
SMALL: Final = ("depth=2", "width=32", "context=32", "batch=16")
EVALUATIONS: Final = 8
_WIDTH: Final = 96


def demo(
    *,
    steps: Annotated[int, typer.Option(min=1, metavar="K", help="Of the training.")] = 700,
) -> Task:
    """Train a byte-level GPT on two processes, verify it against one device, write its report."""
    return partial(_demo, steps)


def _demo(steps: int) -> int:
    from meshwright.launch.contract import here
    from meshwright.run.folder import choose
    from meshwright.view.report import write_report

    if here().world.size > 1:
        raise UsageError("mw demo starts ranks of its own; run it outside of a launcher")
    file = _example()
    run_dir = choose("demo").path
    _explain(file)
    status = _train(file, steps, run_dir)
    if status:
        return status
    _verify(file, run_dir)
    page = write_report(run_dir)
    _next(file, page)
    return 0


def _example() -> Path:
    """The GPT of the examples: in a clone, where it is; else a copy of it to read and change."""
    home = Path(__file__).parents[1]
    cloned = home.parents[1] / "examples" / "gpt.py"
    if cloned.is_file():
        here = Path.cwd()
        return cloned.relative_to(here) if cloned.is_relative_to(here) else cloned
    copy = Path("demo") / "gpt.py"
    if not copy.exists():
        copy.parent.mkdir(exist_ok=True)
        copy.write_text((home / "examples" / "gpt.py").read_text(encoding="utf-8"))
    return copy


def _explain(file: Path) -> None:
    from meshwright.view.tables import plan_table

    record = explained(Which(str(file), SETTINGS), PLAN, RANKS)
    elements = sum(prod(parameter["shape"]) for parameter in record["parameters"])
    _chapter(
        1,
        "Plan",
        f"{file} is an ordinary PyTorch GPT: bytes in, the next byte out, {elements:,} "
        "parameters. It knows nothing of ranks. The plan "
        f"{PLAN} lays it over two: each keeps half of the weights, gradients and optimizer state, "
        "and takes half of every batch.",
    )
    show(Padding(plan_table({**record, "collectives": []}), (0, 0, 1, 2)))
    moved = sum(entry["bytes"] for entry in record["collectives"])
    calls = sum(entry["count"] for entry in record["collectives"])
    where = f"{program()} plan {file} --plan {PLAN} --explain"
    _paragraph(
        f"A step moves {bytes_text(moved)} from each rank, in {calls} collectives. For each, the "
        f"source line that needs it and why: {where}"
    )


def _train(file: Path, steps: int, run_dir: Path) -> int:
    from meshwright.launch.local import launch

    _chapter(
        2,
        "Train",
        "Two processes learn the source text of this Python's own library. One file in twenty is "
        "held out. A model that knows nothing has a loss of ln 256 = 5.55.",
    )
    words = ["train", str(file), "--plan", PLAN, "--steps", str(steps), "--run-dir", str(run_dir)]
    words += ["--evaluate-every", str(max(1, steps // EVALUATIONS))]
    for setting in SETTINGS:
        words += ["--set", setting]
    command = [sys.executable, "-P", "-m", "meshwright", *words]
    return launch(RANKS, command, run_dir=run_dir, plan=PLAN)


def _verify(file: Path, run_dir: Path) -> None:
    from meshwright import api
    from meshwright.view.tables import verify_table

    _chapter(
        3,
        "Verify",
        "The same code at a smaller size, in float64: five steps under the plan, and five of the "
        "untouched eager code on one device. Every gradient, weight and optimizer state is "
        "compared after every step.",
    )
    job = Which(str(file), SMALL).load()
    with Console(stderr=True).status("comparing …"):
        found = api.verify(job, PLAN, steps=5)
    write_json(run_dir / "verify.json", found)
    show(Padding(verify_table(found), (0, 0, 0, 2)))
    if not found["passed"]:
        raise VerificationFailed(failure_text(found))


def _next(file: Path, page: Path) -> None:
    _chapter(4, "Report", "Mesh, loss, time, traffic and memory of this run, on one page:")
    mw = program()
    table = Table.grid(padding=(0, 3, 0, 0))
    for words, why in (
        (f"train {file} -n 2 --plan zero1", "the same numbers, laid out otherwise"),
        (f"verify {file} --plan data=3 --set depth=1", "a batch that three ranks do not divide"),
        (f"plan {file} --plan zero3 -n 8", "what eight ranks would hold and send"),
        (f"train {file} -n 2 --set depth=6 --set width=256", "a larger model, for a longer break"),
    ):
        table.add_row(Text(f"{mw} {words}", "bold"), why)
    address = Text(page.resolve().as_uri(), "bold cyan")
    show(Padding(Group(address, Text(), Text("To try next", "dim"), table), (0, 0, 1, 2)))


def _chapter(number: int, title: str, text: str) -> None:
    """A heading, and what follows in two or three lines."""
    heading = Text.assemble((f"{number} ", "cyan"), (title, "bold"))
    show(Text(), Constrain(Rule(heading, align="left", style="dim"), _WIDTH))
    _paragraph(text)
    show(Text())


def _paragraph(text: str) -> None:
    show(Constrain(Padding(Text(text), (0, 0, 0, 2)), _WIDTH))
