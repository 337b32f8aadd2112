"""Lockstep: all ranks op by op beside one device, to name the first op that differs."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from meshwright.comm.local import run_local
from meshwright.compile.draw import position_operand
from meshwright.compile.interpret import interpret
from meshwright.compile.precision import Promoting
from meshwright.plan.mesh import SAMPLE_AXES
from meshwright.program.layout import Layout, Partial, pieces
from meshwright.program.partition import Local
from meshwright.program.program import Op, Program
from meshwright.program.stage import Key
from meshwright.run.build import Build
from meshwright.run.equality.measure import wide
from meshwright.run.part import box, part_of
from meshwright.run.worker import Worker
from meshwright.schedule.locals import Micro

__all__ = ["first_difference"]

Values = dict[int, Tensor]
LIMIT = 1e-9


@dataclass(frozen=True, slots=True)
class _Played:
    """A program that some ranks ran side by side: what is theirs of it, and every value."""

    workers: Sequence[Worker]
    locals: Sequence[Local]
    seen: Sequence[Values]


def first_difference(build: Build, workers: Sequence[Worker]) -> dict[str, Any] | None:
    """The first op of step 0 whose value over the ranks is not one device's; None if none is.

    Args:
        build: what the ranks run.
        workers: all ranks, at their initial state.
    """
    fetched = [worker.fetch(0) for worker in workers]
    unit = build.unit(fetched[0].micros[0])
    place = position_operand(build.job.seed, 0, 0, 0)
    names = [name for name, _, _ in fetched[0].micros[0].example.leaves]
    parts = [f for w, f in zip(workers, fetched, strict=True) if _reads_first(w)]
    batch = {
        f"batch/{name}": torch.cat([f.leaves[0][k] for f in parts]) for k, name in enumerate(names)
    }
    device: Values = {}
    held = dict.fromkeys(name for worker in workers for name in worker.state.values)
    state = {name: _assembled(build, workers, name) for name in held}
    inputs = {**state, **unit.constants, **batch, "position": place}
    with Promoting() if build.promotes else nullcontext():  # type: ignore[no-untyped-call]
        _single(interpret(unit.program, inputs, watch=lambda _n, _op, now: device.update(now)))

    given = [
        {
            **worker.state.values,
            **unit.constants,
            **{f"batch/{n}": t for n, t in zip(names, found.leaves[0], strict=True)},
            "position": place,
        }
        for worker, found in zip(workers, fetched, strict=True)
    ]
    if build.stages is None:
        lists = (build.lowered(w.rank, f.micros) for w, f in zip(workers, fetched, strict=True))
        played = iter([_play(build, workers, [made.compiled.units[0][1] for made in lists], given)])
    else:
        played = _stages(build, workers, unit.program, given, state)
    found = (_compare(build, one, device) for one in played)
    return next((one for one in found if one is not None), None)


def _play(
    build: Build,
    workers: Sequence[Worker],
    locals_: Sequence[Local],
    given: Sequence[Mapping[str, Tensor]],
    taken: Callable[[Worker, Mapping[str, Tensor]], None] = lambda _worker, _outputs: None,
) -> _Played:
    """Run the workers' programs side by side; `taken` gets each one's outputs."""
    seen: list[Values] = [{} for _ in workers]
    exchanges = {}
    for worker, local, inputs, values in zip(workers, locals_, given, seen, strict=True):

        def watch(_n: int, _op: Op, now: Mapping[int, Tensor], into: Values = values) -> None:
            into.update(now)

        exchanges[worker.rank] = interpret(
            local.program, inputs, worker.place.coordinates, worker.place.groups, watch
        )
    with Promoting() if build.promotes else nullcontext():  # type: ignore[no-untyped-call]
        ends = run_local([exchanges.get(k, _idle()) for k in range(build.mesh.size)])
    for worker in workers:
        taken(worker, ends[worker.rank])
    return _Played(workers, locals_, seen)


def _idle() -> Generator[Any, Any, None]:
    """Of a rank whose stage has nothing to do."""
    yield from ()


def _stages(
    build: Build,
    workers: Sequence[Worker],
    program: Program,
    given: Sequence[Mapping[str, Tensor]],
    state: Mapping[str, Tensor],
) -> Iterator[_Played]:
    """The first micro-batch forward through all stages and back, which first replicas take.

    What a stage sends lies at all of them.
    """
    assert build.stages is not None
    placement = build.stages.schedule("fill-drain", 1).placement
    sent: list[dict[str, Tensor]] = [{} for _ in workers]

    def taken(worker: Worker, outputs: Mapping[str, Tensor]) -> None:
        for peer in build.peers(worker.rank):
            sent[peer].update({n: t for n, t in outputs.items() if n.startswith("value/")})

    micros = [build.staged_micro(worker.rank, program) for worker in workers]
    forward: list[Key] = [(stage, "F") for stage in range(len(placement))]
    back: list[Key] = [(stage, "B") for stage in reversed(range(len(placement)))]
    for key in [*forward, *(back if micros[0].tasks.trains else [])]:
        mine = [w for w in workers if build.within(w.rank)[:2] == (placement[key[0]], 0)]
        sums = frozenset(micros[0].tasks.sums)
        locals_ = [micros[w.rank].local(key, sums, sums)[0] for w in mine]
        inputs = [
            {**_working(build, w, micros[w.rank], given[w.rank], state), **sent[w.rank]}
            for w in mine
        ]
        yield _play(build, mine, locals_, inputs, taken)


def _working(
    build: Build,
    worker: Worker,
    micro: Micro,
    given: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """What a task is given, weights as micro-batches take them: gathered, if once a step."""
    found = dict(given)
    for name, layouts in micro.states.items():
        if f"model/{name}" in found and layouts.weights != build.states[name].weights:
            where = layouts.weights, build.axes, worker.place.coordinates
            found[f"model/{name}"] = part_of(state[f"model/{name}"], *where)
    return found


def _reads_first(worker: Worker) -> bool:
    """Whether no rank before it reads the same samples."""
    stage, replica, here = worker.build.within(worker.rank)
    return (
        not stage
        and not replica
        and all(k == 0 for axis, k in here.items() if axis not in SAMPLE_AXES)
    )


def _single(exchange: Any) -> None:
    """Run an exchange that communicates with nobody."""
    for request in exchange:
        raise AssertionError(request)


def _assembled(build: Build, workers: Sequence[Worker], name: str) -> Tensor:
    """A state value whole, from the ranks' parts."""
    kind, _, bare = name.partition("/")
    holders = [worker for worker in workers if name in worker.state.values]
    if kind != "model":
        return holders[0].state.values[name]
    shape = tuple(build.model.parameters[bare].shape)
    target = torch.empty(shape, dtype=holders[0].state.values[name].dtype)
    for worker in holders:
        layout, part = build.states[bare].weights, worker.state.values[name]
        for there, here in pieces(shape, layout, build.axes, worker.place.coordinates):
            box(target, there).copy_(box(part, here))
    return target


def _compare(build: Build, played: _Played, device: Values) -> dict[str, Any] | None:
    first = played.locals[0]
    for op in first.program.ops:
        for value in op.results:
            origin, layout = first.origin[value]
            if origin not in device or op.base == "meshwright.square":  # of slices, not the whole
                continue
            parts = [values[value] for values in played.seen]
            error = _error(build, played.workers, layout, parts, device[origin])
            if not error <= LIMIT:
                return {
                    "op": op.name,
                    "module": op.module,
                    "source": op.source,
                    "phase": op.phase,
                    "error": error,
                    "layout": str(layout),
                    "value": dict(op.kwargs).get("value", ""),
                }
    return None


def _error(
    build: Build, workers: Sequence[Worker], layout: Layout, parts: Sequence[Tensor], whole: Tensor
) -> float:
    """Largest difference between what the ranks hold under a layout and the whole, relative."""
    exact = wide(whole)
    finite = exact[exact.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    owed = layout.partial_axes
    worst = 0.0
    for worker, part in zip(workers, parts, strict=True):
        want = part_of(exact, layout, build.axes, worker.place.coordinates)
        have = wide(part)
        if owed:
            have = _reduced(layout, workers, worker, parts)
        if want.shape != have.shape:
            return float("inf")
        if want.numel():
            apart = (have - want).abs()
            apart[have == want] = 0.0  # infinities of one sign
            apart[have.isnan() & want.isnan()] = 0.0
            worst = max(worst, float(torch.nan_to_num(apart, nan=math.inf).max()))
    return worst / scale if scale else worst


def _reduced(
    layout: Layout, workers: Sequence[Worker], worker: Worker, parts: Sequence[Tensor]
) -> Tensor:
    """The terms of the ranks that differ from `worker` only in axes that owe a reduction."""
    owed = set(layout.partial_axes)
    kind = next(p for _, p in layout.placements if isinstance(p, Partial)).op
    here = worker.place.coordinates
    terms = [
        wide(part)
        for other, part in zip(workers, parts, strict=True)
        if all(other.place.coordinates[a] == here[a] for a in here if a not in owed)
    ]
    stacked = torch.stack(terms)
    return (
        stacked.sum(0) if kind == "sum" else stacked.amax(0) if kind == "max" else stacked.amin(0)
    )
