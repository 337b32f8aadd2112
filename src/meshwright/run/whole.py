"""A rank's tensors whole again, one at a time: for exports and for the user's own module."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from torch import Tensor

from meshwright.compile.interpret import interpret
from meshwright.program.assemble import gather_program
from meshwright.program.program import Value
from meshwright.run.worker import Worker

__all__ = ["exported", "gathered", "held"]


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
    build, place = worker.build, worker.place
    if name in build.model.buffers:
        return worker.state.values[f"buffer/{name}"]
    tensor, layout = worker.state.values[f"model/{name}"], build.states[name].weights
    if not layout.placements:
        return tensor
    shape = tuple(build.model.parameters[name].shape)
    value = Value(str(tensor.dtype).removeprefix("torch."), shape)
    local = gather_program({name: (value, layout)}, build.axes, place.coordinates)
    outputs = yield from interpret(local.program, {name: tensor}, place.coordinates, place.groups)
    return outputs[name]
