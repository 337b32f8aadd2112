"""Lockstep: all ranks op by op beside one device, to name the first op that differs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
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
from meshwright.program.program import Op
from meshwright.run.build import Build
from meshwright.run.measure import wide
from meshwright.run.part import box, part_of
from meshwright.run.worker import Worker

__all__ = ["first_difference"]

Values = dict[int, Tensor]
LIMIT = 1e-9


def first_difference(build: Build, workers: Sequence[Worker]) -> dict[str, Any] | None:
    """The first op of step 0 whose value over the ranks is not one device's; None if none is.

    Args:
        build: what the ranks run.
        workers: all ranks, at their initial state.
    """
    fetched = [worker.fetch(0) for worker in workers]
    whole = workers[0]
    assert whole.source is not None
    unit = build.unit(fetched[0].micros[0])
    place = position_operand(build.job.seed, 0, 0, 0)
    names = [name for name, _, _ in fetched[0].micros[0].example.leaves]
    parts = [f for w, f in zip(workers, fetched, strict=True) if _reads_first(w)]
    batch = {
        f"batch/{name}": torch.cat([f.leaves[0][k] for f in parts]) for k, name in enumerate(names)
    }
    device: Values = {}
    state = {n: _assembled(build, workers, n) for n in whole.state.values}
    inputs = {**state, **unit.constants, **batch, "position": place}
    with Promoting() if build.promotes else nullcontext():  # type: ignore[no-untyped-call]
        _single(interpret(unit.program, inputs, watch=lambda _n, _op, now: device.update(now)))

    locals_ = [
        build.lowered(w.rank, f.micros).compiled.units[0][1]
        for w, f in zip(workers, fetched, strict=True)
    ]
    seen: list[Values] = [{} for _ in workers]
    exchanges = []
    for worker, found, local, values in zip(workers, fetched, locals_, seen, strict=True):
        mine = {f"batch/{n}": t for n, t in zip(names, found.leaves[0], strict=True)}
        given = {**worker.state.values, **unit.constants, **mine, "position": place}

        def watch(_n: int, _op: Op, now: Mapping[int, Tensor], into: Values = values) -> None:
            into.update(now)

        exchanges.append(
            interpret(local.program, given, worker.place.coordinates, worker.place.groups, watch)
        )
    with Promoting() if build.promotes else nullcontext():  # type: ignore[no-untyped-call]
        run_local(exchanges)
    return _compare(build, workers, locals_, seen, device)


def _reads_first(worker: Worker) -> bool:
    """Whether no rank before it reads the same samples."""
    here = worker.place.coordinates
    return all(index == 0 for axis, index in here.items() if axis not in SAMPLE_AXES)


def _single(exchange: Any) -> None:
    """Run an exchange that communicates with nobody."""
    for request in exchange:
        raise AssertionError(request)


def _assembled(build: Build, workers: Sequence[Worker], name: str) -> Tensor:
    """A state value whole, from the ranks' parts."""
    kind, _, bare = name.partition("/")
    if kind != "model":
        return workers[0].state.values[name]
    shape = tuple(build.model.parameters[bare].shape)
    target = torch.empty(shape, dtype=workers[0].state.values[name].dtype)
    for worker in workers:
        layout, part = build.states[bare].weights, worker.state.values[name]
        for there, here in pieces(shape, layout, build.axes, worker.place.coordinates):
            box(target, there).copy_(box(part, here))
    return target


def _compare(
    build: Build,
    workers: Sequence[Worker],
    locals_: Sequence[Local],
    seen: Sequence[Values],
    device: Values,
) -> dict[str, Any] | None:
    for op in locals_[0].program.ops:
        for value in op.results:
            origin, layout = locals_[0].origin[value]
            if origin not in device:
                continue
            parts = [values[value] for values in seen]
            error = _error(build, workers, layout, parts, device[origin])
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
