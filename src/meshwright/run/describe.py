"""What a run is, as plain data: for the handshake, for run.json, for `mw plan`."""

from __future__ import annotations

import hashlib
import os
import platform
from typing import Any

import psutil
import torch

from meshwright import __version__
from meshwright.predict.memory import memory_bill
from meshwright.program.explain import collectives
from meshwright.program.layout import Layout, local_shape
from meshwright.program.program import Value
from meshwright.run.build import Build, values_of
from meshwright.run.eager import EagerWorker
from meshwright.run.session import Session
from meshwright.run.worker import Fetched

__all__ = ["describe_build", "describe_run", "facts_of"]


def facts_of(session: Session, fetched: Fetched) -> dict[str, str]:
    """What all ranks must have alike before the first step."""
    build = session.build
    if isinstance(session.worker, EagerWorker):
        units = ["eager"]
    else:
        units = [build.unit(micro).program.digest for micro in fetched.micros]
    return {
        "meshwright version": __version__,
        "torch version": str(torch.__version__),
        "plan": build.plan.text(),
        "traced program": hashlib.sha256("".join(units).encode()).hexdigest()[:16],
        "batch_size": str(build.job.batch_size),
        "seed": str(build.job.seed),
        "step": str(session.step),
    }


def describe_run(session: Session, fetched: Fetched) -> dict[str, Any]:
    """run.json without what the command line adds."""
    if isinstance(session.worker, EagerWorker):
        return {**_setting(session.build), "eager": True}
    return describe_build(session.build, fetched)


def describe_build(build: Build, fetched: Fetched) -> dict[str, Any]:
    """The plan laid out: mesh, parameters, collectives with bytes and lines, memory per rank."""
    lowered = build.lowered(0, fetched.micros)
    rows = collectives(lowered.compiled, build.axes)
    return {
        **_setting(build),
        "collectives": [row.as_json() for row in rows],
        "memory": [
            {
                "rank": rank,
                "parts": memory_bill(
                    build.lowered(rank, fetched.micros).compiled, _slots(build, rank)
                ),
            }
            for rank in range(build.mesh.size)
        ],
        "fallbacks": fallbacks(build, fetched),
    }


def _setting(build: Build) -> dict[str, Any]:
    """Versions, host, mesh, batch and parameters."""
    ranks = range(build.mesh.size)
    values = values_of(build.model.parameters, build.dtype)
    return {
        "versions": {
            "meshwright": __version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        "host": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "memory": psutil.virtual_memory().total,
        },
        "plan": build.plan.text(),
        "mesh": {
            "axes": [
                [axis.name, axis.size]
                for axis in build.axes
                if axis.size > 1 or axis.name == "data"
            ],
            "ranks": [{"rank": r, "coordinates": dict(build.place(r).coordinates)} for r in ranks],
        },
        "batch": {"batch_size": build.job.batch_size, "microbatches": build.plan.microbatches},
        "parameters": [_parameter(build, name, value) for name, value in values.items()],
    }


def _slots(build: Build, rank: int) -> int:
    """Bytes of optimizer state on a rank: two slots per trained element is what Adam keeps."""
    coordinates = build.place(rank).coordinates
    total = 0
    for name, value in values_of(build.model.parameters, build.dtype).items():
        if name in build.recipe.names and build.model.parameters[name].requires_grad:
            shape = local_shape(value.shape, build.states[name].optimizer, build.axes, coordinates)
            total += build.recipe.slots() * Value(value.dtype, shape).bytes
    return total


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
        "local": {str(r): held(states.weights, r) for r in range(build.mesh.size)},
    }


def fallbacks(build: Build, fetched: Fetched) -> list[dict[str, str]]:
    """Ops without a rule, computed whole on every rank, with their source lines."""
    from meshwright.program.rules import rule_of

    found: dict[tuple[str, str], dict[str, str]] = {}
    for micro in fetched.micros:
        program = build.unit(micro).program
        for op in program.ops:
            if not rule_of(op, program.values).known:
                found[op.name, op.source] = {
                    "op": op.name,
                    "source": op.source,
                    "module": op.module,
                }
    return list(found.values())
