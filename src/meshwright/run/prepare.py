"""Prepare a job under a plan: blueprint the model, check the plan, lay the state out."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from meshwright.compile.deferred import DeferredBatchNorm
from meshwright.compile.init import blueprint
from meshwright.compile.region import precision_of, shorten
from meshwright.compile.unit import Unit
from meshwright.errors import PlanError, UserCodeError
from meshwright.job import Job
from meshwright.plan.check import Facts, require
from meshwright.plan.plan import Plan
from meshwright.plan.remat import budget_of
from meshwright.program.chosen import chosen_layouts
from meshwright.program.fused import fused_work_layouts
from meshwright.program.layout import Layout
from meshwright.program.zero import zero_layouts
from meshwright.run.budget import choose
from meshwright.run.build import Build, has_batch_norm, mesh_of, values_of
from meshwright.run.form import first_micros
from meshwright.run.offload.probe import steps_apart
from meshwright.run.optimizer.joint import Traces
from meshwright.run.optimizer.recipe import Recipe, draws, is_elementwise, recipe, unsplittable
from meshwright.run.staged import staged

__all__ = ["prepare"]


def prepare(
    job: Job,
    plan: Plan,
    world: int,
    dtype: torch.dtype | None = None,
    data: Any = None,
    units: dict[tuple[Hashable, ...], Unit] | None = None,
    work: Mapping[str, Layout] | None = None,
) -> Build:
    """Blueprint the model and lay its state out.

    Where weights are split by how they are used (`tensor=2`), a micro-batch is traced for it.

    Args:
        job: what to train.
        plan: with or without `data`.
        world: ranks there are.
        dtype: floating tensors' dtype instead of their own.
        data: what `job.data()` returned, where it was called already.
        units: what other builds of this job and dtype have traced, to take from and add to.
        work: how parameters are split while they are worked with, where that is settled.

    Raises:
        PlanError: the plan does not fit the world, the batch or the model.
        UserCodeError: a factory raised or made what it must not.
    """
    plan = plan.filled(world)
    if job.phases is not None:
        raise PlanError(
            "the job trains several losses in phases, and this works out one; take one phase's "
            "job, as job.of(name) gives it"
        )
    known = Facts(world, job.batch_size, job.normalize_over, clip_norm=job.clip_norm, ema=job.ema)
    known = replace(known, slices=None if job.adascale is None else job.adascale.scale)
    require(plan, known)
    model = blueprint(job.model, job.seed)
    norms = has_batch_norm(model.module)
    over = job.normalize_over if norms else None
    require(plan, replace(known, normalize_over=over, normalizes=norms))
    _require_whole_batches(plan, model.module)
    precision = precision_of(plan, model)
    shorten(model, precision.stored)
    made = recipe(model, job.optimizer)
    values = values_of(model.parameters, dtype)
    moved = {n for n in made.names if model.parameters[n].requires_grad}
    build = Build(job, plan, mesh_of(plan), model, made, {}, dtype, precision=precision)
    build.units = {} if units is None else units
    work = _work_layouts(build, data) if work is None else work
    if plan.pipeline > 1 or plan.gather is not None:
        build.stages = staged(build.unit(first_micros(build, data)[0]).program, plan)
    still = frozenset(values) - moved
    build.states = zero_layouts(plan.zero, values, build.axes, still, work, _reduce(build))
    split = any(build.states[name].optimizer.placements for name in moved)
    build.traces = _traces(build, split=split)
    _require_movable(build)
    if (budget := budget_of(plan)) is not None:
        build.chosen = choose(build, first_micros(build, data), budget)
    return build


def _reduce(build: Build) -> str | None:
    """When gradients are reduced: as the plan says, or as what else it asks for needs."""
    if build.plan.reduce is None and build.slices == ():
        return "microbatch"  # AdaScale squares a micro-batch's sum: it cannot be left owing
    if build.plan.reduce is None and build.plan.gather == "step":
        return "step"
    return build.plan.reduce


def _require_movable(build: Build) -> None:
    """What is offloaded can be stepped on the host, and from a disk in chunks of parameters."""
    plan, kind = build.plan, build.recipe.kind.__name__
    asked = f"plan asks for offload={plan.offload}"
    if plan.offloads and build.precision.stored:
        raise PlanError(
            f"{asked}, but what is kept in bf16 is rounded at random where it lies; use "
            "precision=bf16, or drop offload"
        )
    if plan.offloads.get("optimizer") == "disk" and not steps_apart(build.recipe):
        raise PlanError(
            f"{asked}, but {kind} steps parameters together, so that its state cannot pass through "
            "memory in parts; use offload=optimizer:host, or an optimizer that steps each "
            "parameter by itself, such as AdamW"
        )


def _work_layouts(build: Build, data: Any) -> dict[str, Layout]:
    """How axes other than `data` split the parameters."""
    chosen = chosen_layouts(build.plan.layouts, build.values(), build.axes)
    if all(axis.size == 1 for axis in build.axes if axis.name not in ("data", "shard")):
        return {}
    program = build.unit(first_micros(build, data)[0]).program
    return fused_work_layouts(program, build.axes, chosen)


def _require_whole_batches(plan: Plan, model: nn.Module) -> None:
    """Statistics that wait for a batch's micro-batches wait for as many as there are."""
    for name, part in model.named_modules():
        if isinstance(part, DeferredBatchNorm) and part.microbatches != plan.microbatches:
            raise PlanError(
                f"{name or 'the model'} defers its running statistics over {part.microbatches} "
                f"micro-batches, but a batch has microbatches={plan.microbatches}; write "
                f"deferred_batch_norm(model, microbatches={plan.microbatches}) in the job"
            )


def _traces(build: Build, *, split: bool) -> Traces | None:
    """How ranks step jointly what none can step alone; None where each can.

    Raises:
        PlanError: they cannot.
    """
    plan, made = build.plan, build.recipe
    if build.mesh.size == 1:
        return None
    if not split:
        _require_alike(build)
        return None
    if is_elementwise(made):
        return None
    if plan.precision == "bf16-pure" or build.precision.stored:
        raise PlanError(
            f"plan asks for precision=bf16-pure, whose weights each rank rounds where they lie, "
            f"but {made.kind.__name__} is not elementwise: ranks step it jointly in this plan; use "
            "precision=bf16, or data parallelism alone"
        )
    why = unsplittable(made)
    if why is None:
        return Traces(made)
    axes = [f"{axis}={size}" for axis, size in plan.sizes.items() if axis != "data" and size > 1]
    asked = ", ".join([f"zero={plan.zero}"] * bool(plan.zero) + axes)
    less = "zero=0" if plan.zero and not axes else "data parallelism alone"
    raise _refused(asked, made, why, "one rank" if draws(made) else less)


def _require_alike(build: Build) -> None:
    """Replicas that step the same weights must not draw apart."""
    try:
        why = None if is_elementwise(build.recipe) else draws(build.recipe)
    except UserCodeError:  # it takes no small dense matrix; what it does take, its step will tell
        return
    if why is not None:
        raise _refused(build.plan.label, build.recipe, why, "one rank")


def _refused(asked: str, made: Recipe, why: str, less: str) -> PlanError:
    return PlanError(
        f"plan asks for {asked}, but {made.kind.__name__} {why}; use {less} or an optimizer that "
        "steps each parameter by itself, such as AdamW"
    )
