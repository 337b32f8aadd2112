"""What a rank begins with: its parts of the weights, its optimizer over them, its tiers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from meshwright.compile.settings import in_dtype
from meshwright.program.layout import (
    REPLICATED,
    Bounds,
    Layout,
    counted,
    local_shape,
    pieces,
)
from meshwright.run.average import Average
from meshwright.run.build import Build
from meshwright.run.offload.opened import kept_of, store_of
from meshwright.run.offload.store import Store
from meshwright.run.optimizer.adascale import gains_of
from meshwright.run.optimizer.joint import Joint
from meshwright.run.optimizer.recipe import build as build_optimizer
from meshwright.run.optimizer.recipe import is_separable, scheduled
from meshwright.run.optimizer.scaling import scaling_of
from meshwright.run.optimizer.stochastic import Boxes, Rounding
from meshwright.run.part import box, finer
from meshwright.run.step import RankState

__all__ = ["Make", "further_state", "initial_state", "rounding_of"]

Make = Callable[[str, Tensor, Bounds], Tensor | None]
"""(name, blueprint tensor, bounds) -> that part of the real tensor; None: by initialisation."""


def initial_state(build: Build, rank: int, make: Make | None = None) -> RankState:
    """Make this rank's tensors one at a time: its shards, and never more than one whole tensor.

    Args:
        build: of the job and plan.
        rank: whose state.
        make: reads what is given (weights on disk); the rest is initialised.
    """
    model, dtype = build.model, build.dtype
    axes, coordinates = build.axes, build.place(rank).coordinates

    def part(name: str, fake: Tensor, layout: Layout = REPLICATED) -> Tensor:
        shape = tuple(fake.shape)
        local = local_shape(shape, layout, axes, coordinates)
        made = torch.empty(local, dtype=in_dtype(fake.dtype, dtype))
        whole: Tensor | None = None
        for there, here in pieces(shape, layout, axes, coordinates):
            found = make(name, fake, there) if make is not None else None
            if found is None:
                whole = model.make(fake) if whole is None else whole
                found = box(whole, there)
            box(made, here).copy_(found)
        return made

    values: dict[str, Tensor] = {}
    store = store_of(build, rank)
    for name, fake in model.parameters.items():
        if build.holds(rank, full := f"model/{name}"):
            made = part(full, fake, build.states[name].weights)
            values[full] = made if store is None else store.taken(full, made)
    for kind, tensors in (("buffer", model.buffers), ("constant", model.constants)):
        for name, fake in tensors.items():
            if build.holds(rank, f"{kind}/{name}"):
                values[f"{kind}/{name}"] = part(f"{kind}/{name}", fake)
    values["scale"] = torch.tensor(1.0 / build.job.batch_size, dtype=dtype or torch.float32)
    state = _with_optimizer(build, rank, values, store)
    if build.precision.scales:
        state.rescale(scaling_of(build.job.loss_scale, build.job.batch_size))
    return state


def further_state(build: Build, rank: int, first: RankState) -> RankState:
    """What a further phase of a job begins with: an optimizer over weights that are there."""
    state = _with_optimizer(build, rank, first.values, first.store)
    if build.precision.scales:
        state.scaling = scaling_of(build.job.loss_scale, build.job.batch_size)
    return state


def _with_optimizer(
    build: Build, rank: int, values: dict[str, Tensor], store: Store | None
) -> RankState:
    axes, coordinates = build.axes, build.place(rank).coordinates
    shards: dict[str, nn.Parameter] = {}
    counts: dict[str, tuple[Bounds, ...]] = {}
    recipe = build.recipe.of(name for name in build.recipe.names if f"model/{name}" in values)
    for name in recipe.names:
        fake, states = build.model.parameters[name], build.states[name]
        part = values[f"model/{name}"]
        if states.optimizer != states.weights:
            shape = tuple(fake.shape)
            part = finer(part, shape, states.weights, states.optimizer, axes, coordinates)
        shards[name] = nn.Parameter(part, requires_grad=fake.requires_grad)
    for name, fake in build.model.parameters.items():
        if fake.requires_grad and f"model/{name}" in values:
            layout = build.states[name].optimizer
            mine = build.counts(rank, f"model/{name}")
            boxes = counted(tuple(fake.shape), layout, axes, coordinates) if mine else ()
            counts[name] = boxes
    trained = tuple(counts)
    optimizer = build_optimizer(recipe, shards)
    scheduler = None if build.job.schedule is None else scheduled(optimizer, build.job.schedule)
    seen = frozenset(name for name, boxes in counts.items() if boxes)
    partly = {name: boxes for name, boxes in counts.items() if build.states[name].optimizer.fused}
    joint = _joint(build, rank, shards, optimizer)
    kept = kept_of(build, shards, optimizer, store)
    average = None if build.job.ema is None else Average.of(build.job.ema, shards, store)
    gains = gains_of(build.job.adascale, build.recipe.groups, build.slicing)
    told = scheduler, partly, None, rounding_of(build, coordinates), kept, store, average, gains
    return RankState(values, shards, optimizer, seen, trained, joint, *told)


def _joint(
    build: Build,
    rank: int,
    shards: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> Joint:
    """What steps the parameters of which other ranks hold a part that this one's update needs."""
    traces, values = build.traces, build.values()
    split = () if traces is None else (n for n in shards if build.states[n].optimizer.placements)
    parameters = {name: values[name] for name in split}
    place = build.place(rank)
    return Joint(traces, build.axes, place, parameters, build.states, shards, optimizer)


def rounding_of(build: Build, coordinates: Mapping[str, int] | None = None) -> Rounding | None:
    """How what a rank keeps in bf16 is stepped; of whole tensors without `coordinates`."""
    numbers = {
        name: number
        for number, name in enumerate(build.model.parameters)
        if name in build.precision.stored
    }
    if not numbers or build.dtype is not None:
        return None
    shapes = {name: tuple(build.model.parameters[name].shape) for name in numbers}
    boxes: dict[str, Boxes] = {}
    for name, shape in shapes.items() if coordinates is not None else ():
        assert coordinates is not None
        boxes[name] = tuple(pieces(shape, build.states[name].optimizer, build.axes, coordinates))
    return Rounding(build.job.seed, numbers, shapes, boxes, not is_separable(build.recipe))
