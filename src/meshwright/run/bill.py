"""The memory bill of every rank of a build, in named parts, from what each one compiles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from meshwright.comm.lane import capacity_for
from meshwright.comm.sharing import room_of
from meshwright.plan.offload import TIERS, Part
from meshwright.predict.memory import memory_bill
from meshwright.predict.staged import most_held, staged_bill
from meshwright.program.assemble import Compiled
from meshwright.program.away import slots
from meshwright.program.instruction import InstructionList
from meshwright.program.layout import local_shape
from meshwright.program.offload import FLIGHT, MOVED
from meshwright.program.program import Value
from meshwright.run.build import Build, Micro, micro_ranges, values_of
from meshwright.run.foreseen import joint_bytes
from meshwright.run.offload.disk import buffered
from meshwright.run.offload.kept import CHUNK, chunks_of
from meshwright.run.offload.probe import steps_apart
from meshwright.run.optimizer.stochastic import BLOCK_ELEMENTS, CHUNK_ELEMENTS
from meshwright.schedule.bubble import endless

__all__ = ["SLACK", "away", "bill_of", "bills"]

SLACK = 0.25
"""Of what a step makes and frees: what malloc holds between blocks, as measured on glibc."""

_COMES_AND_GOES = ("gradients", "saved activations", "working memory")


def bills(build: Build, micros: Sequence[Micro]) -> Iterator[dict[str, int]]:
    """Memory by part on every rank; ranks whose shards are alike are compiled once."""
    return (parts for parts, _ in _each(build, micros))


def _each(build: Build, micros: Sequence[Micro]) -> Iterator[tuple[dict[str, int], int]]:
    """By rank, memory by part, and a rank that is alike."""
    slots = build.recipe.slots()
    seen: dict[Any, tuple[dict[str, int], int]] = {}
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
            parts = (
                memory_bill(compiled, held, gone)
                if build.stages is None and not gone.keys() & {"activations", "gradients"}
                else _staged(build, rank, staged_bill(compiled, *_state(build, rank), held, gone))
            )
            if build.job.ema is not None and "optimizer" not in gone:
                parts = {**parts, "average": _averaged(shards.values())}
            seen[form] = parts, rank
        yield seen[form]


def bill_of(build: Build, micros: Sequence[Micro]) -> list[dict[str, Any]]:
    """The bill of every rank, as run.json has it.

    `parts` are tensors, each at its most. `beside` is what a process has beside them. `peak` is
    what all come to at once, which is less where gradients come as activations go, and more where
    memory that collectives keep lies idle. `saving` is what a copy for a checkpoint takes at most.
    """
    found, seen = [], dict[int, tuple[int, dict[str, int]]]()
    for rank, (parts, alike) in enumerate(_each(build, micros)):
        if alike not in seen:
            compiled = build.lowered(alike, micros).compiled
            wide = _wide(build, alike)
            held = most_held(compiled, _state(build, alike)[0])
            further = parts["saved activations"] - held.activations if endless(build.plan) else 0
            comes = max(held.peak + further, parts["gradients"] + wide)
            # Gradients that no freed activations make room for lie between what comes and goes.
            between = max(0, parts["gradients"] - parts["saved activations"])
            beside = {
                "batches": _batches(compiled),
                "communication buffers": _buffers(build, alike, compiled.instructions),
                "slack": int(SLACK * comes) + between + wide + _new(build, alike),
            }
            seen[alike] = comes, beside
        comes, beside = seen[alike]
        state = sum(size for name, size in parts.items() if name not in _COMES_AND_GOES)
        far = away(build, rank, micros) if build.plan.offload != "none" else {}
        entry: dict[str, Any] = {"rank": rank, "parts": parts, "beside": beside}
        entry["peak"] = state + comes + sum(beside.values()) + far.get("host", 0)
        entry["saving"] = _copied(build, rank, parts)
        found.append(entry | ({"away": far} if far else {}))
    return found


def _wide(build: Build, rank: int) -> int:
    """What a step of weights that are kept in bf16 makes of a chunk: all of it in float32.

    The optimizer takes two more at most while it computes; a block that is rounded, some 48 bytes
    of each element.
    """
    if not build.precision.stored or build.dtype is not None:
        return 0
    kept = [v for n, v in _shards(build, rank).items() if n in build.precision.stored]
    sizes = [value.elements for value in kept]
    elements = max(min(sum(sizes), CHUNK_ELEMENTS), max(sizes, default=0))
    return 4 * elements * (5 + build.recipe.slots()) + 48 * min(elements, BLOCK_ELEMENTS)


def _batches(compiled: Compiled) -> int:
    """This step's batch and the next one's, which is read meanwhile."""
    return 2 * sum(
        count * sum(u.program.values[v].bytes for n, v in u.program.inputs if _of_batch(n))
        for count, u in compiled.units
    )


def _of_batch(name: str) -> bool:
    return name.startswith("batch/")


def _copied(build: Build, rank: int, parts: Mapping[str, int]) -> int:
    """The most that a copy of a rank's state takes while it is written."""
    shards = sum(value.bytes for value in _shards(build, rank).values())
    return shards + parts["optimizer"] + parts["buffers"] + parts.get("average", 0)


def _buffers(build: Build, rank: int, lists: InstructionList) -> int:
    """Shared memory that collectives and messages pass through, on one host."""
    groups = build.place(rank).groups
    used = {each.axis for each in lists.body if each.kind == "Start" and each.axis} | {"world"}
    members = {groups[axis].ranks for axis in used if axis in groups}
    found = sum(room_of(len(ranks)) for ranks in members if len(ranks) > 1)
    lanes: dict[tuple[str, int], int] = {}
    for each in lists.body:
        if each.kind in ("Send", "Recv") and each.segment is not None and each.peer is not None:
            size = sum(value.bytes for value in lists.messages[each.segment].values)
            lane = each.kind, each.peer
            lanes[lane] = max(lanes.get(lane, 0), size)
    return found + sum(map(capacity_for, lanes.values()))


def _averaged(shards: Iterable[Value]) -> int:
    """Bytes of the average of a rank's shards, which is never kept in 16 bits."""
    short = ("bfloat16", "float16")
    return sum(value.bytes * (2 if value.dtype in short else 1) for value in shards)


def _staged(build: Build, rank: int, bill: dict[str, int]) -> dict[str, int]:
    """The bill with what a pipeline that never flushes keeps: older weights, more in flight."""
    pipe = endless(build.plan)
    if pipe is None:
        return bill
    stage, _ = build.mesh.coordinates(rank)
    older = (pipe.versions(stage) - 1) * bill["weights"]
    flight = pipe.in_flight(stage)
    listed = min(flight, build.plan.microbatches)  # the list is of one minibatch
    activations = bill["saved activations"] * flight // listed
    return {**bill, "older weights": older, "saved activations": activations}


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
    if build.job.ema is not None:
        optimizer += _averaged(shards.values())
    sums = sum(v.bytes for v in shards.values())
    sizes: dict[Part, int] = {
        "optimizer": optimizer, "gradients": sums, "params": sum(weights.values()),
        "activations": _activations(build, rank, micros),
    }  # fmt: skip
    found = {tier: sum(sizes[p] for p, t in asked.items() if t == tier) for tier in TIERS}
    if asked:
        found["host"] += _passing(build, held, weights)
    if "disk" in asked.values():
        found["host"] += buffered(max((*weights.values(), *held.values()), default=0))
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
    chunks = _chunks(build, held)
    sizes = [sum(held[name] for name in names) for names in chunks]
    here = all(asked.get(part) == "host" for part in MOVED)  # nothing of a chunk is copied
    far = slots * (asked.get("optimizer") == "disk") + (asked.get("gradients") == "disk")
    read = [far * size for size in sizes]
    if asked.get("params") == "disk":  # also of those of which a shard is stepped, the whole
        whole = (sum(weights[f"model/{name}"] for name in names) for names in chunks)
        read = [size + more for size, more in zip(read, whole, strict=True)]
    return (0 if here else 2 * max(sizes, default=0)) + sum(sorted(read)[-3:])


def _chunks(build: Build, held: Mapping[str, int]) -> tuple[tuple[str, ...], ...]:
    """The parameters that are stepped together on the host."""
    return chunks_of(held, CHUNK if steps_apart(build.recipe) else sum(held.values()))


def _new(build: Build, rank: int) -> int:
    """State of the optimizer that is yet to go to the host: a chunk's, and what leaves.

    On its way to a disk it takes no more than what passes through the host in later steps.
    """
    if build.plan.offloads.get("optimizer") != "host":
        return 0
    held = {n: v.bytes for n, v in _shards(build, rank).items() if n in build.recipe.names}
    chunks = [sum(held[name] for name in names) for names in _chunks(build, held)]
    slots = build.recipe.slots()
    return min(slots * max(chunks, default=0) + FLIGHT, slots * sum(chunks))
