"""A rank's tensors whole again, one at a time: for exports and for the user's own module."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import Any

import torch
from torch import Tensor

from meshwright.comm.base import Group, Start, Wait
from meshwright.compile.interpret import interpret
from meshwright.compile.settings import in_dtype
from meshwright.program.assemble import gather_program
from meshwright.program.layout import Layout
from meshwright.program.program import Value
from meshwright.run.build import Build
from meshwright.run.worker import Worker

__all__ = ["config_of", "exported", "gathered", "held", "whole_of"]


def exported(worker: Worker) -> tuple[str, ...]:
    """What an export holds: the names of the model's state_dict in its order; tied ones once."""
    model = worker.build.model
    return tuple(
        name
        for name in model.module.state_dict()
        if name in model.parameters or name in model.buffers
    )


def held(worker: Worker) -> tuple[str, ...]:
    """Every parameter and every buffer; tied ones once."""
    model = worker.build.model
    return (*model.parameters, *model.buffers)


def gathered(worker: Worker, name: str) -> Generator[Any, Any, Tensor]:
    """A parameter or buffer whole, on every rank; an exchange.

    Where the rank holds it whole already, it is the rank's own.
    """
    build = worker.build
    full = f"buffer/{name}" if name in build.model.buffers else f"model/{name}"
    here = build.holds(worker.rank, full)
    tensor = (yield from _of_stage(worker, name)) if here else _empty(worker, full)
    homes = build.homes.get(full, ())
    if homes and len(homes) < len(build.mesh.stages):
        tensor = yield from _from_stage(worker, homes[0], tensor, name)
    return tensor


def _of_stage(worker: Worker, name: str) -> Generator[Any, Any, Tensor]:
    """A parameter or buffer of this rank's stage whole, from the stage's ranks."""
    if name in worker.build.model.buffers:
        return worker.state.values[f"buffer/{name}"]
    if worker.state.store is not None:
        worker.state.store.require_whole((f"model/{name}",))
    layout = worker.build.states[name].weights
    whole = yield from whole_of(worker, name, worker.state.values[f"model/{name}"], layout)
    return whole


def whole_of(
    worker: Worker, name: str, tensor: Tensor, layout: Layout
) -> Generator[Any, Any, Tensor]:
    """Of a parameter's shape, what the stage's ranks hold in this layout; an exchange."""
    build, place = worker.build, worker.place
    if not layout.placements:
        return tensor
    shape = tuple(build.model.parameters[name].shape)
    value = Value(str(tensor.dtype).removeprefix("torch."), shape)
    local = gather_program({name: (value, layout)}, build.axes, place.coordinates)
    outputs = yield from interpret(local.program, {name: tensor}, place.coordinates, place.groups)
    return outputs[name]


def _empty(worker: Worker, full: str) -> Tensor:
    """Room for what another stage holds."""
    kind, _, name = full.partition("/")
    model = worker.build.model
    fake = model.buffers[name] if kind == "buffer" else model.parameters[name]
    return torch.empty(tuple(fake.shape), dtype=in_dtype(fake.dtype, worker.build.dtype))


def _from_stage(
    worker: Worker, home: int, tensor: Tensor, name: str
) -> Generator[Any, Any, Tensor]:
    """What `home` holds, on the ranks of all stages: each from that with its coordinates."""
    seats = worker.build.seats(worker.rank)
    group = Group("pipeline", tuple(rank for replicas in seats for rank in replicas))
    root, tensor = group.ranks.index(seats[home][0]), tensor.contiguous()
    handle = yield Start("broadcast", group, (tensor,), root=root, label=name)
    (whole,) = yield Wait(handle)
    return whole  # type: ignore[no-any-return]


def config_of(build: Build) -> Mapping[str, Any] | None:
    """A Hugging Face model's own configuration, where it has one."""
    config: Any = vars(build.model.module).get("config")
    has_form = any("to_dict" in vars(kind) for kind in type(config).__mro__)
    return dict(config.to_dict()) if has_form else None
