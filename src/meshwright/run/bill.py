"""The memory bill of every rank of a build, in named parts, from what each one compiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from meshwright.predict.memory import memory_bill
from meshwright.predict.staged import staged_bill
from meshwright.program.layout import local_shape
from meshwright.program.program import Value
from meshwright.run.build import Build, Micro, micro_ranges, values_of
from meshwright.run.foreseen import joint_bytes
from meshwright.schedule.bubble import endless

__all__ = ["bills"]


def bills(build: Build, micros: Sequence[Micro]) -> Iterator[dict[str, int]]:
    """Memory by part on every rank; ranks whose shards are alike are compiled once."""
    slots = build.recipe.slots()
    seen: dict[Any, dict[str, int]] = {}
    for rank in range(build.mesh.size):
        shards = _shards(build, rank)
        ranges = micro_ranges(build.job.batch_size, len(micros))
        samples = tuple(stop - start for start, stop in (build.samples_of(rank, r) for r in ranges))
        stage, _ = build.mesh.coordinates(rank)
        form = (stage, samples, tuple(shards.values()))
        if form not in seen:
            joint = joint_bytes(build, rank)
            alone = (n for n in build.recipe.names if n in shards and n not in joint)
            held = sum(joint.values()) + slots * sum(shards[n].bytes for n in alone)
            compiled = build.lowered(rank, micros).compiled
            seen[form] = (
                memory_bill(compiled, held)
                if build.stages is None
                else _staged(build, rank, staged_bill(compiled, *_state(build, rank), held))
            )
        yield seen[form]


def _staged(build: Build, rank: int, bill: dict[str, int]) -> dict[str, int]:
    """The bill with the older weights that a pipeline which never flushes keeps."""
    pipe = endless(build.plan)
    if pipe is None:
        return bill
    older = pipe.versions(build.mesh.coordinates(rank)[0]) - 1
    return {**bill, "older weights": older * bill["weights"]}


def _state(build: Build, rank: int) -> tuple[int, int]:
    """Bytes of the weights and of the buffers that a rank holds between steps."""
    coordinates, values = build.place(rank).coordinates, build.values()
    weights = sum(
        Value(value.dtype, local_shape(value.shape, layout, build.axes, coordinates)).bytes
        for name, value in values.items()
        if build.holds(rank, f"model/{name}")
        for layout in (build.states[name].weights,)
    )
    kept = values_of(build.model.buffers, build.dtype)
    return weights, sum(v.bytes for n, v in kept.items() if build.holds(rank, f"buffer/{n}"))


def _shards(build: Build, rank: int) -> dict[str, Value]:
    """A rank's parts of the parameters that are trained, as the optimizer holds them."""
    coordinates = build.place(rank).coordinates
    found = {}
    for name, value in values_of(build.model.parameters, build.dtype).items():
        if build.model.parameters[name].requires_grad and build.holds(rank, f"model/{name}"):
            layout = build.states[name].optimizer
            shape = local_shape(value.shape, layout, build.axes, coordinates)
            found[name] = Value(value.dtype, shape)
    return found
