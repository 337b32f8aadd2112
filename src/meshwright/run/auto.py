"""`plan="auto"` until there is a planner: the first plan whose state fits the memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import psutil

from meshwright.compile.init import blueprint
from meshwright.errors import OutOfMemory
from meshwright.job import Job
from meshwright.plan.mesh import Axis
from meshwright.plan.plan import Plan
from meshwright.plan.size import bytes_text
from meshwright.program.layout import local_shape
from meshwright.program.program import Value
from meshwright.program.zero import zero_layouts
from meshwright.run.build import Build, values_of

__all__ = ["candidates", "choose_plan", "require_host", "state_bytes"]

SHARE = 0.7
"""Of the free memory that state may take; activations take the rest."""


def candidates(world: int, slices: int | None = None) -> Iterator[Plan]:
    """In the order in which they are tried: the fewer collectives, the sooner.

    What AdaScale calls slices of a batch are shared out to ranks, or else are micro-batches.
    """
    parts = 1 if slices is None else slices // world if slices % world == 0 else slices
    for zero in (0, 1, 2, 3) if world > 1 else (0,):
        yield Plan(data=world, zero=zero, microbatches=parts)


def state_bytes(parameters: dict[str, Value], plan: Plan) -> int:
    """Bytes a rank keeps: weights, gradients, two optimizer slots."""
    data = plan.data or 1
    layouts = zero_layouts(plan.zero, parameters, (Axis("data", data),))

    def held(value: Value, *, split: bool) -> int:
        return value.bytes // data if split else value.bytes

    return sum(
        held(value, split=bool(layouts[name].weights.placements))
        + held(value, split=plan.zero >= 2 and bool(layouts[name].optimizer.placements))
        + 2 * held(value, split=bool(layouts[name].optimizer.placements))
        for name, value in parameters.items()
    )


def require_host(build: Build, ranks: int) -> None:
    """Return if a host can hold what each of its ranks must: weights, and their gradients once.

    What optimizers and activations take comes on top; `mw plan --memory` counts it all.

    Args:
        build: of the job under the plan.
        ranks: on this host.

    Raises:
        OutOfMemory: it cannot, whatever else is running.
    """
    place = build.axes, build.place(0).coordinates
    needed = 0
    for name, value in build.values().items():
        states = build.states[name]
        layouts = [states.weights]
        if build.model.parameters[name].requires_grad:
            layouts.append(states.optimizer)
        for layout in layouts:
            shape = local_shape(value.shape, layout, *place)
            needed += replace(value, shape=shape).bytes
    there = psutil.virtual_memory().total
    if needed * ranks > there:
        here = f"each of the {ranks} ranks" if ranks > 1 else "the one rank"
        raise OutOfMemory(
            f"plan {build.plan.label} needs {bytes_text(needed)} for weights and gradients on "
            f"{here} of this host, which has {bytes_text(there)}; split them (zero3, tensor=2) "
            "over more hosts, or use a smaller model"
        )


def choose_plan(job: Job, world: int) -> Plan:
    """The first of data=N, zero1, zero2, zero3 whose state fits this host's free memory.

    Time is not compared.

    Raises:
        OutOfMemory: none does.
    """
    model = blueprint(job.model, job.seed)
    values = values_of(model.parameters, None)
    free = int(psutil.virtual_memory().available * SHARE) // world
    for plan in candidates(world, None if job.adascale is None else job.adascale.scale):
        if state_bytes(values, plan) <= free:
            return plan
    needed = state_bytes(values, Plan(data=world, zero=3 if world > 1 else 0))
    raise OutOfMemory(
        f"the model's state needs {needed / 2**30:.1f} GiB a rank even under zero3 on {world} "
        "ranks, but "
        f"{free / 2**30:.1f} GiB a rank are free; start more ranks, or use a smaller model"
    )
