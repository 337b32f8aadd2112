"""The cheapest change of a plan that fits a memory: each candidate priced by the same bill."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from meshwright.compile.unit import Unit
from meshwright.errors import MeshwrightError
from meshwright.job import Job
from meshwright.plan.check import Facts, check
from meshwright.plan.plan import Plan
from meshwright.plan.size import bytes_text
from meshwright.program.cost import op_costs
from meshwright.run.bill import bill_of
from meshwright.run.build import Build, Micro
from meshwright.run.form import first_micros
from meshwright.run.prepare import prepare

__all__ = ["Fit", "candidates", "fitting", "out_of_memory", "parts_text", "seconds_of", "weighed"]

_NETWORK, _BUS, _DISK = 2e9, 8e9, 1e9  # bytes per second; what matters here is their ratio
_CALL = 2e-6  # seconds of an op beside its work
_SHOWN, _PATIENCE = 3, 20.0


@dataclass(frozen=True, slots=True)
class Fit:
    """A plan, the bytes that its neediest rank needs, and the seconds of a step as predicted."""

    plan: Plan
    memory: int
    seconds: float


def candidates(plan: Plan, batch_size: int) -> Iterator[Plan]:
    """Plans for as many ranks that need less, roughly from the cheapest on.

    Each change by itself, then ZeRO-3 with remat, more micro-batches, and offload on top.
    """
    data = plan.data or 1
    stages = [replace(plan, zero=zero) for zero in range(plan.zero + 1, 4) if data > 1]
    again = ["selective", "full"] if plan.remat == "none" else []
    most = batch_size // data
    counts = [k for k in (2, 4, 8) if plan.microbatches * k <= most]
    parts = [replace(plan, microbatches=plan.microbatches * k) for k in counts]
    yield from _legal(plan, batch_size, [
        *stages, *(replace(plan, remat=how) for how in again), *parts,
        *_away(plan), *_together(plan, parts[-1] if parts else plan),
    ])  # fmt: skip


def _away(plan: Plan) -> list[Plan]:
    """With what is not offloaded yet in host memory's or the disk's place."""
    tiers = ["optimizer:disk", "disk"] if plan.offload == "none" else ["disk"]
    return [replace(plan, offload=where) for where in tiers if where != plan.offload]


def _together(plan: Plan, most: Plan) -> Iterator[Plan]:
    sharded = replace(most, zero=3 if (plan.data or 1) > 1 else plan.zero)
    again = replace(sharded, remat="full") if plan.remat == "none" else sharded
    yield from (replace(again, microbatches=plan.microbatches), again)
    yield from _away(again)


def _legal(plan: Plan, batch_size: int, found: Sequence[Plan]) -> Iterator[Plan]:
    seen = {plan}
    for other in found:
        if other not in seen and not check(other, Facts(plan.ranks, batch_size)):
            seen.add(other)
            yield other


def weighed(build: Build, micros: Sequence[Micro]) -> Fit:
    """What a build needs and takes."""
    bills = bill_of(build, micros)
    worst = max(bills, key=lambda entry: entry["peak"])
    away: Mapping[str, int] = worst.get("away", {})
    seconds = seconds_of(build, worst["rank"], micros)
    seconds += 2 * (away.get("host", 0) / _BUS + away.get("disk", 0) / _DISK)
    return Fit(build.plan, worst["peak"], seconds)


def seconds_of(build: Build, rank: int, micros: Sequence[Micro]) -> float:
    """About how long a rank computes and moves what its list says."""
    compiled = build.lowered(rank, micros).compiled
    lists = compiled.instructions
    each = [sum(op_costs(segment)) + _CALL * len(segment.ops) for segment in lists.segments]
    values = {
        id(op): local.program.values[op.results[0]].bytes
        for local in (*(local for _, local in compiled.units), *compiled.moves)
        for op in local.program.ops
        if op.name.startswith("comm.")
    }
    total = 0.0
    for instruction in lists.body:
        if instruction.segment is None:
            continue
        if instruction.kind == "Run":
            total += each[instruction.segment]
        elif instruction.kind == "Start":
            calls = lists.calls[instruction.segment]
            total += sum(values.get(id(op), 0) for op in calls) / _NETWORK
    return total


def fitting(
    job: Job, plan: Plan, room: int, patience: float = _PATIENCE
) -> tuple[Fit | None, list[Fit]]:
    """The plan itself, and those near it that fit, the quickest first.

    Args:
        job: that is trained.
        plan: that does not fit.
        room: bytes that a rank has.
        patience: seconds after which no further plan is looked at.
    """
    data, until = job.data(), time.monotonic() + patience
    units: dict[Any, Unit] = {}

    def fit(other: Plan) -> Fit | None:
        # What cannot be laid out, or has no memory left for it, is no way out.
        with suppress(MeshwrightError, MemoryError, RuntimeError):
            build = prepare(job, other, other.ranks, None, data, units)
            return weighed(build, first_micros(build, data))
        return None

    own = fit(plan)
    others = takewhile(lambda _: time.monotonic() < until, candidates(plan, job.batch_size))
    found = [each for each in map(fit, others) if each is not None and each.memory <= room]
    return own, sorted(found, key=lambda each: each.seconds)


def out_of_memory(
    job: Job,
    plan: Plan,
    entry: Mapping[str, Any],
    room: int,
    why: str,
    process: int = 0,
    share: float = 1.0,
) -> str:
    """What a plan needs on its neediest rank, by part, what there is, and what would fit.

    Args:
        job: that is trained.
        plan: that does not fit.
        entry: the rank's bill, as `bill_of` gives it.
        room: bytes that it may have.
        why: what limits them.
        process: bytes of it that the process itself takes.
        share: of that room, and of what the plan needs, that another plan may take.
    """
    own, found = fitting(job, plan, int(share * (min(room, entry["peak"] + process)) - process))
    needs = f"plan {plan.label} needs {bytes_text(entry['peak'] + process)} on rank {entry['rank']}"
    text = f"{needs} ({parts_text(entry, process)}), but {bytes_text(room)} are free {why}"
    if not found:
        return f"{text}; no plan near it fits: start more ranks, or use a smaller model or batch"
    told = (_told(plan, each, own, process) for each in found[:_SHOWN])
    return f"{text}; " + "; ".join(told)


def parts_text(entry: Mapping[str, Any], process: int = 0) -> str:
    """`weights 1.2 GiB, gradients 1.2 GiB`, largest first."""
    parts = {**entry["parts"], **entry.get("beside", {}), "process": process}
    if host := entry.get("away", {}).get("host", 0):
        parts["host memory"] = host
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    shown = [f"{name} {bytes_text(size)}" for name, size in ordered if size * 50 >= entry["peak"]]
    return ", ".join(shown)


def _told(plan: Plan, fit: Fit, own: Fit | None, process: int) -> str:
    """`remat=full needs 3.2 GiB (+31 % time)`."""
    change = _change(plan, fit.plan)
    time_ = ""
    if own is not None and own.seconds:
        more = fit.seconds / own.seconds - 1
        time_ = f" ({more:+.0%} time)".replace("%", " %")
    return f"{change} needs {bytes_text(fit.memory + process)}{time_}"


def _change(plan: Plan, other: Plan) -> str:
    """The words of a plan that another has not."""
    before = plan.text().split(",")
    return ",".join(word for word in other.text().split(",") if word not in before) or other.label
