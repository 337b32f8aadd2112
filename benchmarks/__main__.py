"""`make bench`: the whole reach table in one run, told as it goes, then the page and its pictures.

    make bench
    make bench ARGS="--only data-1 gpt100k --rounds 12"
    make bench ARGS="--quick"

A full run writes docs/benchmarks.md and docs/benchmarks/; parts and quick runs write to .bench/,
unless `--renew` says that they replace these parts of the page, which tells when each ran.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import special
from benchmarks.harness import peers
from benchmarks.harness.measure import Measured, measure
from benchmarks.harness.result import as_json
from benchmarks.page.machine import machine
from benchmarks.page.page import page, renewed
from benchmarks.page.pictures import draw
from benchmarks.page.tables import on_terminal
from benchmarks.reach import GROUPS

ROOT = Path(__file__).parents[1]
console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)


def parts(
    rounds: int | None,
    patience: float,
    memory: float = 2.0,
    *,
    quick: bool,
    reasons: dict[str, str],
) -> dict[str, Callable[[], Measured]]:
    """Everything that can be run, by name."""
    most = rounds or (2 if quick else None)
    found: dict[str, Callable[[], Measured]] = {
        group.name: functools.partial(measure, group, reasons, say, most, patience * group.seconds)
        for group in GROUPS
    }
    found["curve"] = lambda: special.curve(say, 20 if quick else 100)
    found["bytes"] = lambda: special.bytes_moved(say)
    found["bill"] = lambda: special.bill(say)
    found["deepest"] = lambda: special.deepest(say)
    found["scheduling"] = lambda: special.scheduled(say, rounds or (3 if quick else 9))
    found["collectives"] = lambda: special.collectives(say, rounds or 9, quick=quick)
    found["checkpoint"] = lambda: special.checkpoint(say, rounds or 9, quick=quick)
    steps = found["offload"]
    found["offload"] = lambda: special.offload(
        steps(), say, rounds or (3 if quick else 9), quick=quick
    )
    found["ladder"] = lambda: special.ladder(
        say, int(memory * 2**30), reasons, patience, quick=quick
    )
    found["first"] = lambda: special.first(say, rounds or (3 if quick else 9))
    found["gpu"] = special.gpu
    return found


def say(text: str) -> None:
    """Progress."""
    console.print(f"  {time.strftime('%H:%M:%S')}  {text}", markup=False, soft_wrap=True)


def run(wanted: dict[str, Callable[[], Measured]]) -> dict[str, Any]:
    """Everything wanted, one after another; a part that breaks is told, and the rest goes on."""
    began, raw = time.monotonic(), {"machine": machine(), "groups": {}, "broken": {}}
    for name, part in wanted.items():
        console.rule(f"[bold]{name}", align="left")
        now = machine()
        try:
            found = part()
        except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
            raw["broken"][name] = f"{type(error).__name__}: {error}"
            say(f"{name} broke: {raw['broken'][name]}")
            continue
        console.print(on_terminal(name, found.results))
        results = [as_json(result) for result in found.results]
        raw["groups"][name] = {
            "results": results,
            "raw": {**found.raw, **{key: now[key] for key in ("load", "began", "commit")}},
        }
    raw["minutes"], raw["load_at_end"] = (time.monotonic() - began) / 60, os.getloadavg()[0]
    return raw


def write(raw: dict[str, Any], docs: Path) -> None:
    """The page, its pictures and the raw numbers."""
    pictures = draw(raw, docs / "benchmarks")
    (docs / "benchmarks" / "raw.json").write_text(json.dumps(raw, indent=1) + "\n")
    (docs / "benchmarks.md").write_text(page(raw, pictures))
    console.print(f"written: {docs / 'benchmarks.md'}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__.splitlines()[0])
    names = [*parts(None, 1.0, quick=False, reasons={})]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--list", action="store_true", help="names for --only, and keys of lines")
    parser.add_argument("--rounds", type=int, help="at most, in place of each part's own")
    parser.add_argument("--patience", type=float, default=1.0, help="times each part's time")
    parser.add_argument("--memory", type=float, default=2.0, help="GiB a rank, of the ladder")
    parser.add_argument("--quick", action="store_true", help="few rounds: whether it runs")
    parser.add_argument("--page", action="store_true", help="write the page from raw.json anew")
    parser.add_argument("--renew", action="store_true", help="put these parts onto the page")
    asked = parser.parse_args()
    whole = asked.only == names and not asked.quick and not asked.rounds
    docs = ROOT / ("docs" if whole or asked.page or asked.renew else ".bench")
    if asked.list:
        for group in GROUPS:
            console.print(group.name, *(line.key for _, line in group.lines), soft_wrap=True)
        return
    if asked.page:
        write(json.loads((docs / "benchmarks" / "raw.json").read_text()), docs)
        return
    # So that a stopped run ends its processes: a signal becomes an exception that unwinds.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    reasons = peers.ensure()
    all_parts = parts(
        asked.rounds, asked.patience, asked.memory, quick=asked.quick, reasons=reasons
    )
    raw = run({name: all_parts[name] for name in asked.only})
    docs.mkdir(exist_ok=True)
    write(renewed(raw, docs) if asked.renew else raw, docs)
    lines = [r for group in raw["groups"].values() for r in group["results"]]
    console.print(f"{len(lines)} lines in {raw['minutes']:.1f} minutes")


if __name__ == "__main__":
    main()
