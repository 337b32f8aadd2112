"""A job's phases: which parameters each trains, and a build for each of them over one model state.

A phase is a job of its own whose other parameters are frozen: it is traced, laid out and stepped as
any job is. What phases share is where the weights and buffers lie.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from meshwright.compile.init import blueprint
from meshwright.compile.outcome import RESERVED
from meshwright.errors import PlanError, UsageError
from meshwright.job import Job, Phase
from meshwright.plan.plan import Plan
from meshwright.program.layout import Layout
from meshwright.program.program import Program
from meshwright.run.build import Build
from meshwright.run.form import first_micros
from meshwright.run.prepare import prepare

__all__ = ["Frozen", "builds_of", "divided", "job_of"]


@dataclass(frozen=True, slots=True)
class Frozen:
    """A model factory that freezes the parameters which a phase leaves alone."""

    factory: Callable[[], Any]
    trained: frozenset[str]

    def __call__(self) -> Any:
        """The model."""
        model = self.factory()
        for name, parameter in model.named_parameters():
            if name not in self.trained:
                parameter.requires_grad = False
        return model


def divided(job: Job) -> dict[str, frozenset[str]]:
    """The parameters that each phase trains.

    Raises:
        UsageError: a phase matches none; one is in no phase, or in several that do not say so.
    """
    phases = job.phases or {}
    module = blueprint(job.model, job.seed).module
    trainable = [name for name, p in module.named_parameters() if p.requires_grad]
    found = {name: _matched(name, phase, trainable) for name, phase in phases.items()}
    alone = [name for name in trainable if not any(name in mine for mine in found.values())]
    if alone:
        more = f" and {len(alone) - 3} more" if len(alone) > 3 else ""
        raise UsageError(
            f"no phase trains {', '.join(alone[:3])}{more}; add them to the parameters of one, or "
            "freeze them in model() with requires_grad_(False)"
        )
    for name in trainable:
        _require_stated(job, name, [phase for phase, mine in found.items() if name in mine])
    for name in RESERVED & phases.keys():
        raise UsageError(
            f"a phase is called {name}, which records keep for themselves; use another name"
        )
    return found


def _matched(name: str, phase: Phase, trainable: Sequence[str]) -> frozenset[str]:
    found: set[str] = set()
    for pattern in phase.patterns:
        matched = fnmatch.filter(trainable, pattern)
        if not matched:
            known = ", ".join(trainable[:4])
            raise UsageError(
                f"phase {name} has parameters={pattern!r}, which matches no parameter that is "
                f"trained; there are {known}{', ...' if len(trainable) > 4 else ''}"
            )
        found |= set(matched)
    return frozenset(found)


def _require_stated(job: Job, name: str, phases: Sequence[str]) -> None:
    if len(phases) < 2:
        return
    assert job.phases is not None
    for phase in phases:
        if not job.phases[phase].overlap:
            raise UsageError(
                f"phases {' and '.join(phases)} both train {name}; let one do so, or say "
                "overlap=True in each of them"
            )
    if job.ema is not None:
        raise UsageError(
            f"phases {' and '.join(phases)} both train {name}, whose average (ema={job.ema}) would "
            "count the steps of either; leave ema out, or let one of them train it"
        )


def job_of(job: Job, name: str, trained: frozenset[str]) -> Job:
    """The job that trains one phase alone."""
    return replace(job.of(name), model=Frozen(job.model, trained))


def builds_of(
    job: Job, plan: Plan, world: int, dtype: torch.dtype | None = None, data: Any = None
) -> dict[str, Build]:
    """A build for each phase, by name; of a job without phases, one under an empty name.

    Args:
        job: what to train.
        plan: with or without `data`.
        world: ranks there are.
        dtype: floating tensors' dtype instead of their own.
        data: what `job.data()` returned, where it was called already.

    Raises:
        PlanError: the plan does not fit the world, the batch, the model or the phases.
        UsageError: the phases do not divide the parameters.
    """
    if job.phases is None:
        return {"": prepare(job, plan, world, dtype, data)}
    _require_fitting(plan)
    jobs = {name: job_of(job, name, mine) for name, mine in divided(job).items()}
    builds = {name: prepare(one, plan, world, dtype, data) for name, one in jobs.items()}
    work = _agreed(builds, data)
    for name, build in builds.items():
        if {n: states.work for n, states in build.states.items()} != work:
            builds[name] = prepare(jobs[name], plan, world, dtype, data, build.units, work)
    return builds


def _require_fitting(plan: Plan) -> None:
    if plan.pipeline > 1 or plan.gather is not None:
        key = f"pipeline={plan.pipeline}" if plan.pipeline > 1 else f"gather={plan.gather}"
        raise PlanError(
            f"plan asks for {key}, whose stages are cut from the ops of one loss, but the job "
            "trains several in phases; use data, zero, tensor, context or expert"
        )


def _agreed(builds: Mapping[str, Build], data: Any) -> dict[str, Layout]:
    """How each parameter is worked with in all phases: as the first that reads it does.

    Raises:
        PlanError: two phases that read one would have it otherwise.
    """
    found: dict[str, tuple[str, Layout]] = {}
    unread: dict[str, Layout] = {}
    split = any(
        axis.size > 1 and axis.name not in ("data", "shard")
        for build in builds.values()
        for axis in build.axes
    )
    for phase, build in builds.items():
        read = _read(build.unit(first_micros(build, data)[0]).program) if split else build.states
        for name, states in build.states.items():
            unread.setdefault(name, states.work)
            if name not in read:
                continue
            first, layout = found.setdefault(name, (phase, states.work))
            if layout != states.work:
                raise PlanError(
                    f"plan {build.plan.label} would split {name} as {layout} for phase {first} and "
                    f"as {states.work} for phase {phase}; name its dims in the plan's layouts"
                )
    return {**unread, **{name: layout for name, (_, layout) in found.items()}}


def _read(program: Program) -> frozenset[str]:
    """The parameters that some op reads."""
    used = {value for op in program.ops for value in op.inputs}
    return frozenset(
        name.removeprefix("model/")
        for name, value in program.inputs
        if name.startswith("model/") and value in used
    )
