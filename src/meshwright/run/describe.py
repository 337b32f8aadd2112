"""What a run is, as plain data: for the handshake, for run.json, for `mw plan`."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch

from meshwright.job import Job
from meshwright.plan.mesh import Axis
from meshwright.plan.plan import Plan
from meshwright.plan.toml import to_toml
from meshwright.program.block import block
from meshwright.program.conflict import conflicts
from meshwright.program.explain import Row, collectives
from meshwright.program.exposure import calls
from meshwright.program.fallback import fallbacks
from meshwright.program.fold import folded, pattern_of
from meshwright.program.layout import Layout, local_shape
from meshwright.program.program import Value
from meshwright.run.bill import bill_of
from meshwright.run.build import Build, Micro, values_of
from meshwright.run.eager import EagerWorker
from meshwright.run.foreseen import describe_optimizer, update_rows
from meshwright.run.form import first_micros
from meshwright.run.observe.resident import settled
from meshwright.run.phases import builds_of
from meshwright.run.remat import describe_remat
from meshwright.run.session import Session
from meshwright.run.stages import describe_pipeline, most_moved
from meshwright.run.worker import Fetched
from meshwright.schedule.locals import open_unit

VERSION = importlib.metadata.version("meshwright")

__all__ = [
    "describe_build",
    "describe_phases",
    "describe_run",
    "explain",
    "facts_of",
    "host",
    "nearby",
    "versions",
]


def versions() -> dict[str, str]:
    """What numbers depend on."""
    return {
        "meshwright": VERSION,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def host() -> dict[str, str | int]:
    """This machine: processor, the cores and bytes of memory that this process may use."""
    return {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": psutil.virtual_memory().total,
    }


def _processor() -> str:
    """The processor's name; its architecture where the system does not tell."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def nearby(source: str) -> str:
    """A `file:line` relative to the working folder, or to where packages are installed."""
    installed = source.rpartition("/site-packages/")[2]
    return installed.removeprefix(str(Path.cwd()) + "/")


def facts_of(session: Session) -> dict[str, str]:
    """What all ranks must have alike before they do anything together."""
    build = session.build
    job, source = session.given, session.worker.source
    each = [
        (f" of phase {name}" if name else "", one)
        for name, (one, _) in session.worker.phases.items()
    ]
    optimizers = {
        key + phase: value for phase, one in each for key, value in _optimizer_facts(one).items()
    }
    return {
        "meshwright version": VERSION,
        "torch version": str(torch.__version__),
        "plan": to_toml(build.plan) if build.plan.lists else build.plan.text(),
        "batch_size": str(job.batch_size),
        "seed": str(job.seed),
        "phases": str(None if job.phases is None else [job.order, *job.phases]),
        "adascale": str(job.adascale),
        "ema": str(job.ema),
        "steps": str(job.steps),
        "epochs": str(job.epochs),
        "samples in the data": str(None if source is None else source.length),
        "eager": str(isinstance(session.worker, EagerWorker)),
        "compile": str(build.compiled),
        "saved for the backward": _saved(build),
        "parameters": hashlib.sha256(repr(build.values()).encode()).hexdigest()[:16],
        **optimizers,
    }


def _saved(build: Build) -> str:
    """A digest of what was chosen for a budget: each rank does so by itself."""
    if build.chosen is None or build.chosen.kept is None:
        return "by the plan"
    return hashlib.sha256(repr(sorted(build.chosen.kept)).encode()).hexdigest()[:16]


def _optimizer_facts(build: Build) -> dict[str, str]:
    """Its class, and each group's settings: replicas that step apart would drift apart."""
    recipe = build.recipe
    found = {"clip_norm": str(build.job.clip_norm), "optimizer": recipe.kind.__name__}
    for number, (names, settings) in enumerate(recipe.groups):
        group = f" of optimizer group {number}"
        found["size" + group] = str(len(names))
        found |= {key + group: str(value) for key, value in sorted(settings.items())}
    return found


def describe_run(session: Session, fetched: Fetched) -> dict[str, Any]:
    """run.json without what the command line adds."""
    if isinstance(session.worker, EagerWorker):
        return {**_setting(session.build), "eager": True}
    builds = {name: build for name, (build, _) in session.worker.phases.items()}
    return describe_phases(builds, fetched.micros)


def describe_phases(builds: Mapping[str, Build], micros: Sequence[Micro]) -> dict[str, Any]:
    """What `describe_build` says; of several phases, of that which moves most.

    The others are in `phases`. A rank needs what the largest of them needs, and all their
    optimizers' state.
    """
    if "" in builds:
        return describe_build(builds[""], micros)
    each = {name: describe_build(build, micros) for name, build in builds.items()}
    ranks = zip(*(found["memory"] for found in each.values()), strict=True)
    memory = [_together(bills) for bills in ranks]
    each = {name: {**found, "memory": memory} for name, found in each.items()}
    most = max(each.values(), key=lambda found: found["traffic"]["bytes"])
    return {**most, "phases": each}


_EACH = ("optimizer", "average")
"""Parts of a bill that a rank holds for every phase at once."""


def _together(bills: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A rank's bill over all phases; what is away is counted for each."""
    names = dict.fromkeys(name for bill in bills for name in bill["parts"])
    parts = {
        name: (sum if name in _EACH else max)(bill["parts"].get(name, 0) for bill in bills)
        for name in names
    }
    own = [sum(bill["parts"].get(name, 0) for name in _EACH) for bill in bills]
    beside = bills[0]["beside"]
    found = {
        "rank": bills[0]["rank"],
        "parts": parts,
        "beside": {name: max(bill["beside"][name] for bill in bills) for name in beside},
        "peak": sum(own) + max(b["peak"] - mine for b, mine in zip(bills, own, strict=True)),
        "saving": sum(own) + max(b["saving"] - mine for b, mine in zip(bills, own, strict=True)),
    }
    if "away" in bills[0]:
        tiers = bills[0]["away"]
        found["away"] = {tier: sum(bill["away"][tier] for bill in bills) for tier in tiers}
    return found


def describe_build(build: Build, micros: Sequence[Micro]) -> dict[str, Any]:
    """The plan laid out: mesh, parameters, collectives with bytes and lines, memory per rank."""
    piped = describe_pipeline(build, micros)
    rank = 0 if piped is None else most_moved(build, piped)
    compiled, axes = build.lowered(rank, micros).compiled, build.lines(rank)
    rows = (*collectives(compiled, axes), *update_rows(build, rank))
    return {
        **_setting(build),
        **({} if piped is None else {"pipeline": piped}),
        "optimizer": describe_optimizer(build),
        **({} if build.plan.remat == "none" else {"remat": _remat(build, micros[0])}),
        "compile": build.compiled,
        "traffic": _traffic(rows, sum(1 for _ in calls(compiled.instructions))),
        "collectives": [_near(row.as_json()) for row in rows],
        "fallbacks": [_near(found.as_json()) for found in fallbacks(compiled, axes)],
        "conflicts": [_near(found.as_json()) for found in conflicts(compiled, axes)],
        "attention": _near(_attention(build, micros)),
        "block": _near(block(compiled, axes).as_json()),
        "memory": bill_of(build, micros),
    }


def _remat(build: Build, micro: Micro) -> dict[str, Any]:
    """What is computed again in the first micro-batch."""
    program = open_unit(build.unit(micro).program, build.states)
    return describe_remat(build.plan, program, build.kept(program))


def _attention(build: Build, micros: Sequence[Micro]) -> list[dict[str, Any]]:
    """The form of each attention over split sequences, those of repeated layers as one."""
    groups: dict[tuple[str, str, str, str], list[str]] = {}
    for one in build.unit(micros[0]).attention:
        key = (one.form, one.why, one.source, pattern_of(one.module))
        groups.setdefault(key, []).append(one.module)
    return [
        {"form": form, "why": why, "source": source, "module": folded(names), "count": len(names)}
        for (form, why, source, _), names in groups.items()
    ]


def _traffic(rows: Sequence[Row], messages: int) -> dict[str, int]:
    """A step's collectives added up; those of a bucket are one message."""
    return {
        "bytes": sum(row.bytes for row in rows),
        "exposed_bytes": sum(row.exposed_bytes for row in rows),
        "calls": sum(row.count for row in rows),
        "messages": messages,
    }


def _near(value: Any) -> Any:
    """The value with its source lines relative to the working folder."""
    if isinstance(value, dict):
        return {k: nearby(v) if k == "source" else _near(v) for k, v in value.items()}
    return [_near(entry) for entry in value] if isinstance(value, list | tuple) else value


def explain(job: Job, plan: Plan, ranks: int) -> dict[str, Any]:
    """What `describe_build` says of a job under a plan; nothing is initialised or started.

    Only rank 0's samples of the first step are read, for their shapes. `process` is what this
    process holds: that of a rank, which traces the same, holds about as much beside its tensors.
    """
    builds = builds_of(job, plan, ranks)
    found = describe_phases(builds, first_micros(next(iter(builds.values()))))
    return found | {"process": settled()}


def _setting(build: Build) -> dict[str, Any]:
    """Versions, host, mesh, batch and parameters."""
    ranks = range(build.mesh.size)
    values = values_of(build.model.parameters, build.dtype)
    axes = [axis for axis in build.axes if axis.size > 1 or axis.name == "data"]
    stages = [["pipeline", build.plan.pipeline]] if build.plan.pipeline > 1 else []
    parameters = [_parameter(build, name, value) for name, value in values.items()]
    return {
        "versions": versions(),
        "host": host(),
        "plan": build.plan.label,
        "mesh": {
            "axes": [*stages, *([axis.name, axis.size] for axis in axes)],
            "ranks": [{"rank": r, "coordinates": _coordinates(build, r, axes)} for r in ranks],
        },
        "batch": {"batch_size": build.job.batch_size, "microbatches": build.plan.microbatches},
        "parameters": parameters,
        "layouts": _layouts(parameters),
    }


def _coordinates(build: Build, rank: int, axes: Sequence[Axis]) -> dict[str, int]:
    """A rank's coordinates along these axes, its stage's before them."""
    stage, found = build.mesh.coordinates(rank)
    piped = {"pipeline": stage} if build.plan.pipeline > 1 else {}
    return piped | {axis.name: found[axis.name] for axis in axes}


def _parameter(build: Build, name: str, value: Value) -> dict[str, Any]:
    states = build.states[name]
    trained = build.model.parameters[name].requires_grad

    def held(layout: Layout, rank: int) -> list[int]:
        coordinates = build.place(rank).coordinates
        return list(local_shape(value.shape, layout, build.axes, coordinates))

    return {
        "name": name,
        "shape": list(value.shape),
        "dtype": value.dtype,
        "bytes": value.bytes,
        "weights": str(states.weights),
        "gradients": str(states.gradients) if trained else None,
        "optimizer": str(states.optimizer) if trained and name in build.recipe.names else None,
        "local": {
            str(r): held(states.weights, r)
            for r in range(build.mesh.size)
            if build.holds(r, f"model/{name}")
        },
    }


def _layouts(parameters: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The parameters, those of repeated layers as one: a pattern of names, and how many it is."""
    alike: dict[str, list[dict[str, Any]]] = {}
    for parameter in parameters:
        rest = {key: value for key, value in parameter.items() if key != "name"}
        alike.setdefault(repr((pattern_of(parameter["name"]), rest)), []).append(parameter)
    names = [parameter["name"] for parameter in parameters]
    return [
        {**group[0], "name": folded([p["name"] for p in group], names), "count": len(group)}
        for group in alike.values()
    ]
