"""The memory bill of every rank of a build, in named parts, from what each one compiles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from meshwright.plan.offload import TIERS, Part
from meshwright.predict.memory import memory_bill
from meshwright.predict.staged import staged_bill
from meshwright.program.away import slots
from meshwright.program.layout import local_shape
from meshwright.program.offload import MOVED
from meshwright.program.program import Value
from meshwright.run.build import Build, Micro, micro_ranges, values_of
from meshwright.run.foreseen import joint_bytes
from meshwright.run.offload.kept import CHUNK, chunks_of
from meshwright.run.offload.probe import steps_apart
from meshwright.schedule.bubble import endless

__all__ = ["away", "bills"]


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
            compiled, gone = build.lowered(rank, micros).compiled, build.plan.offloads
            seen[form] = (
                memory_bill(compiled, held, gone)
                if build.stages is None and "activations" not in gone
                else _staged(build, rank, staged_bill(compiled, *_state(build, rank), held, gone))
            )
            if build.job.ema is not None:
                seen[form] = {**seen[form], "average": _averaged(shards.values())}
        yield seen[form]


def _averaged(shards: Iterable[Value]) -> int:
    """Bytes of the average of a rank's shards, which is never kept in 16 bits."""
    short = ("bfloat16", "float16")
    return sum(value.bytes * (2 if value.dtype in short else 1) for value in shards)


def _staged(build: Build, rank: int, bill: dict[str, int]) -> dict[str, int]:
    """The bill with the older weights that a pipeline which never flushes keeps."""
    pipe = endless(build.plan)
    if pipe is None:
        return bill
    older = pipe.versions(build.mesh.coordinates(rank)[0]) - 1
    return {**bill, "older weights": older * bill["weights"]}


def _state(build: Build, rank: int) -> tuple[dict[str, int], int]:
    """Bytes of the weights that a rank holds between steps, by name, and of its buffers."""
    coordinates, values = build.place(rank).coordinates, build.values()
    weights = {
        f"model/{name}": Value(
            value.dtype, local_shape(value.shape, layout, build.axes, coordinates)
        ).bytes
        for name, value in values.items()
        if build.holds(rank, f"model/{name}")
        for layout in (build.states[name].weights,)
    }
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


def away(build: Build, rank: int, micros: Sequence[Micro] = ()) -> dict[str, int]:
    """Bytes that a rank keeps outside its device's memory, by tier; what passes through counts.

    A step on the host holds a chunk of weights and gradients there, where they do not rest on it;
    three chunks of what is read from a disk: one comes, one is stepped, one goes.
    """
    asked, shards = build.plan.offloads, _shards(build, rank)
    held = {n: v.bytes for n, v in shards.items() if n in build.recipe.names}
    weights, _ = _state(build, rank)
    optimizer = build.recipe.slots() * sum(held.values())
    sums = sum(v.bytes for v in shards.values())
    sizes: dict[Part, int] = {
        "optimizer": optimizer, "gradients": sums, "params": sum(weights.values()),
        "activations": _activations(build, rank, micros),
    }  # fmt: skip
    found = {tier: sum(sizes[p] for p, t in asked.items() if t == tier) for tier in TIERS}
    if asked:
        found["host"] += _passing(build, held, weights)
    return found


def _activations(build: Build, rank: int, micros: Sequence[Micro]) -> int:
    """Bytes of the slots that saved activations rest in."""
    if "activations" not in build.plan.offloads or not micros:
        return 0
    lists = build.lowered(rank, micros).compiled.instructions
    return sum(value.bytes for value in slots(lists).values())


def _passing(build: Build, held: Mapping[str, int], weights: Mapping[str, int]) -> int:
    """Bytes of chunks that pass through the host."""
    asked, slots = build.plan.offloads, build.recipe.slots()
    most = CHUNK if steps_apart(build.recipe) else sum(held.values())
    chunks = chunks_of(held, most)
    sizes = [sum(held[name] for name in names) for names in chunks]
    here = all(asked.get(part) == "host" for part in MOVED)  # nothing of a chunk is copied
    far = slots * (asked.get("optimizer") == "disk") + (asked.get("gradients") == "disk")
    read = [far * size for size in sizes]
    if asked.get("params") == "disk":  # also of those of which a shard is stepped, the whole
        whole = (sum(weights[f"model/{name}"] for name in names) for names in chunks)
        read = [size + more for size, more in zip(read, whole, strict=True)]
    return (0 if here else 2 * max(sizes, default=0)) + sum(sorted(read)[-3:])
