"""One group from start to end: crews, the check that all do the same work, rounds, results."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks import models
from benchmarks.harness.crew import Crew, Failed, Timed
from benchmarks.harness.lines import CONTROL, judged
from benchmarks.harness.result import Result, failed
from benchmarks.harness.rounds import play
from benchmarks.harness.task import Task
from benchmarks.reach import CONTROLS, Group

LOSS_ERROR, BF16_ERROR, DROPOUT_ERROR = 2e-4, 1e-2, 5e-2  # relative


@dataclass(slots=True)
class Measured:
    """A group's numbers."""

    results: list[Result]
    raw: dict[str, Any] = field(default_factory=dict)


def measure(
    group: Group,
    reasons: Mapping[str, str],
    say: Callable[[str], None],
    most: int | None,
    seconds: float,
) -> Measured:
    """Run a group.

    Args:
        group: of `reach.GROUPS`.
        reasons: of peers that are not installed, by module.
        say: progress.
        most: rounds, in place of the group's.
        seconds: after which no other round begins.
    """
    with tempfile.TemporaryDirectory(prefix="mw-bench-") as folder, ExitStack() as stack:
        crews, losses, absent = _start(group, reasons, Path(folder), stack, say)
        alive = {name: crew for name, crew in crews.items() if name in losses}
        lines = [group.control, *(line for _, line in group.lines)]
        found, broken = play(
            alive,
            lines,
            group.steps,
            group.warm,
            most or group.most,
            seconds,
            lambda number, turn: say(_told(number, turn)),
        )
        absent |= broken
    return Measured(_results(group, found, absent), _raw(group, found, absent, losses))


def different_work(
    tasks: Mapping[str, Task], losses: Mapping[str, tuple[float, ...]]
) -> dict[str, str]:
    """Contestants whose first losses are not those of the control, and of the first one world.

    Unconnected copies agree with the others on the first loss only, before any update; so do those
    that read weights which are older than the last update.
    """
    reasons: dict[str, str] = {}
    whole = next((f for n, f in losses.items() if f and _one_world(tasks[n])), ())
    first = next((losses[n] for n in CONTROL if n in losses), whole)[:1]
    for name, found in losses.items():
        task = tasks[name]
        allowed = (
            BF16_ERROR if "bf16" in task.plan else DROPOUT_ERROR if task.dropout else LOSS_ERROR
        )
        follows = _one_world(task) and not task.ahead
        expected = (*first, *(whole[1:] if follows else ()))
        if any(abs(a - b) > allowed * abs(b) for a, b in zip(found, expected, strict=False)):
            reasons[name] = f"not the same work: its losses are {found}, not {expected}"
    return reasons


def _one_world(task: Task) -> bool:
    """Whether it trains one model on the global batch."""
    return task.connected or task.ranks == 1


def _start(
    group: Group,
    reasons: Mapping[str, str],
    folder: Path,
    stack: ExitStack,
    say: Callable[[str], None],
) -> tuple[dict[str, Crew], dict[str, tuple[float, ...]], dict[str, str]]:
    """Crews that are ready, the losses of those that do the same work, the others' reasons.

    They start one after another: together they would build slower, and hit their deadlines.
    """
    weights = folder / "weights.safetensors"
    models.save_weights(group.model, weights)
    crews: dict[str, Crew] = {}
    losses: dict[str, tuple[float, ...]] = {}
    absent: dict[str, str] = {}
    for place, (name, task) in enumerate(group.contestants.items()):
        if task.package in reasons:
            absent[name] = reasons[task.package]
            continue
        say(f"starting {name}")
        crew = Crew.started(name, replace(task, weights=str(weights)), folder / str(place))
        stack.callback(crew.close)
        crews[name] = crew
        try:
            losses[name] = crew.losses()
        except Failed as reason:
            absent[name] = str(reason)
    odd = different_work(group.contestants, losses)
    return crews, {n: f for n, f in losses.items() if n not in odd}, absent | odd


def _results(
    group: Group, found: Mapping[str, list[Timed]], absent: Mapping[str, str]
) -> list[Result]:
    limit = _shown(group, found, CONTROL, per_step=False)
    results = []
    for section, line in [(CONTROLS, group.control), *group.lines]:
        missing = [n for n in (line.ours, *line.others) if n not in found]
        if missing or not found[line.ours]:
            why = "; ".join(f"{name}: {absent.get(name, 'no round')}" for name in missing)
            results.append(failed(section, line.key, line.what, line.target, line.sense, why))
            continue
        ratio, said = judged(line, {n: [t.seconds for t in ts] for n, ts in found.items()})
        per_step = line.sense == "at most"
        mine, theirs = (
            _shown(group, found, names, per_step=per_step) for names in ((line.ours,), line.others)
        )
        bound = _shown(group, found, CONTROL, per_step=True) if per_step else limit
        results.append(
            Result(
                section, line.key, line.what, mine, theirs, bound, ratio, line.target, line.sense,
                said,
            )
        )  # fmt: skip
    return results


def _shown(
    group: Group, found: Mapping[str, list[Timed]], names: tuple[str, ...], *, per_step: bool
) -> str:
    """The median speed of contestants, with its unit; empty where one is missing."""
    if any(not found.get(name) for name in names):
        return ""
    task = group.contestants[names[0]]
    tokens = task.rows * task.ranks * models.SHAPES[task.model].context
    seconds = statistics.median(t.seconds for name in names for t in found[name])
    return f"{seconds * 1e3:.2f} ms" if per_step else f"{tokens / seconds:,.0f} tok/s"


def _told(number: int, turn: Mapping[str, Timed]) -> str:
    times = "  ".join(f"{name} {timed.seconds * 1e3:.0f}" for name, timed in turn.items())
    return f"round {number + 1}, ms a step: {times}"


def _raw(
    group: Group,
    found: Mapping[str, list[Timed]],
    absent: Mapping[str, str],
    losses: Mapping[str, tuple[float, ...]],
) -> dict[str, Any]:
    return {
        "steps": group.steps,
        "warm": group.warm,
        "tasks": {name: asdict(task) for name, task in group.contestants.items()},
        "first_losses": dict(losses),
        "seconds": {name: [t.seconds for t in turns] for name, turns in found.items()},
        "cpu_seconds": {name: [t.cpu for t in turns] for name, turns in found.items()},
        "peak_bytes": {name: max(turns[-1].peaks) for name, turns in found.items() if turns},
        "rank_peak_bytes": {name: turns[-1].peaks for name, turns in found.items() if turns},
        "absent": dict(absent),
    }
