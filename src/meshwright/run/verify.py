"""Verify: a plan's numbers against one device's, tensor by tensor, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meshwright.comm.base import Comm, gather_json
from meshwright.comm.local import LocalWorld
from meshwright.compile.draw import SampleDim
from meshwright.compile.example import example_of
from meshwright.job import Job
from meshwright.plan.plan import Plan
from meshwright.program.layout import Layout, region
from meshwright.run.build import Build, Micro, prepare
from meshwright.run.data import Source, open_source
from meshwright.run.lockstep import first_difference
from meshwright.run.measure import KINDS, LAW, Report, compare, order
from meshwright.run.persist import given_weights
from meshwright.run.reference import Reference, Snapshot, slots
from meshwright.run.rounding import float32_limits, own_rounding
from meshwright.run.step import Policy
from meshwright.run.worker import Make, Worker

__all__ = [
    "KINDS",
    "LAW",
    "Report",
    "merge",
    "reference_for",
    "verify_local",
    "verify_rank",
    "verify_session",
]


def _slot_of(name: str) -> str:
    """The kind of `optimizer/<slot>/<parameter>`: its slot."""
    return name.split("/")[1]


def reference_for(build: Build, source: Source, **how: Any) -> Reference:
    """The reference of a build, counting random ops' samples as its programs do."""

    def draws(tree: Any, samples: int) -> Sequence[SampleDim | None]:
        return build.unit(Micro(example_of(tree)[0], samples)).draws

    how = {"microbatches": build.plan.microbatches, "precision": build.plan.precision, **how}
    return Reference(build.job, build.model, source, draws=draws, dtype=build.dtype, **how)


def verify_rank(
    worker: Worker, reference: Reference, steps: int, report: Report
) -> Generator[Any, Any, None]:
    """Run `steps` steps on this rank and put every error against the reference into `report`."""
    worker.keep_gradients = {}
    fetched = yield from worker.agree_on_shapes(worker.fetch(0))
    for step in range(steps):
        upcoming = step + 1 if step + 1 < steps else None
        metrics, _ = yield from worker.step(fetched, upcoming)
        snapshot = reference.after(step)
        compare_step(worker, metrics.loss, snapshot, step, report)
        if worker.ahead is not None:
            fetched = worker.ahead


def compare_step(
    worker: Worker, loss: float, snapshot: Snapshot, step: int, report: Report
) -> None:
    """Put the errors of one step into the report."""
    build, place = worker.build, worker.place

    def lies(name: str, *, optimizer: bool) -> Layout | None:
        states = build.states.get(name)
        return None if states is None else states.optimizer if optimizer else states.weights

    def bounds(name: str, tensor: Tensor, *, optimizer: bool) -> tuple[tuple[int, int], ...]:
        layout = lies(name, optimizer=optimizer)
        shape = tuple(tensor.shape)
        if layout is None or (
            name in build.model.parameters and shape != tuple(build.model.parameters[name].shape)
        ):
            return tuple((0, size) for size in shape)
        return region(shape, layout, build.axes, place.coordinates)

    floor = max(abs(snapshot.loss), 1e-300)
    report.add("loss", abs(loss - snapshot.loss) / floor, "loss", step)
    found = compare(
        worker.keep_gradients or {},
        snapshot.gradients,
        lambda name, t: bounds(name, t, optimizer=True),
        lambda _: "gradients",
    )
    for name, error in found.items():
        report.add("gradients", error, name, step)
    if step == 0:
        report.first_gradients = report.worst["gradients"]
    state = {n: t for n, t in worker.state.values.items() if n.startswith(("model/", "buffer/"))}
    found = compare(
        state,
        snapshot.weights,
        lambda name, t: bounds(
            name.partition("/")[2] if name.startswith("model/") else "", t, optimizer=False
        ),
        lambda name: name.partition("/")[0],
    )
    for name, error in found.items():
        report.add("weights", error, name.partition("/")[2], step)
    names = {id(p): name for name, p in worker.state.shards.items()}
    found = compare(
        slots(worker.state.optimizer, names),
        snapshot.optimizer,
        lambda name, t: bounds(name.split("/", 2)[2], t, optimizer=True),
        _slot_of,
    )
    for name, error in found.items():
        report.add("optimizer", error, name.removeprefix("optimizer/"), step)


def merge(report: Report, worker: Worker) -> Generator[Any, Any, Report]:
    """The report over all ranks: each rank's own, gathered."""
    mine = {
        k: [w.error if math.isfinite(w.error) else -1.0, w.tensor, w.step]
        for k, w in report.worst.items()
    }
    everyone = yield from gather_json(mine, worker.group, "verify's report")
    overs = yield from gather_json(
        {n: e if math.isfinite(e) else -1.0 for n, e in report.over.items()},
        worker.group,
        "verify's report of weights",
    )
    whole = Report(limits=report.limits)
    for found in everyone:
        for kind, (error, tensor, step) in found.items():
            whole.add(kind, math.inf if error < 0 else error, tensor, step)
    for over in overs:
        for name, error in over.items():
            whole.add("weights", math.inf if error < 0 else error, name, 0)
    return whole


def _outcome(build: Build, report: Report, steps: int, dtype: str) -> dict[str, Any]:
    """The report as plain data."""
    worst = report.worst_tensor
    return {
        "passed": report.passed,
        "plan": build.plan.text(),
        "ranks": build.mesh.size,
        "steps": steps,
        "dtype": dtype,
        "worst_relative_error": {kind: report.worst[kind].error for kind in KINDS},
        "worst_tensor": worst.tensor,
        "worst_step": worst.step,
        "law": {kind: report.limits[kind] for kind in report.limits},
        "rounding": {
            n: [e, report.rounding[n]] for n, e in report.over.items() if n in report.rounding
        },
    }


def _source(job: Job, data: Any) -> Source:
    return open_source(data, batch_size=job.batch_size, seed=job.seed, collate=job.collate)


def _started(
    job: Job,
) -> tuple[Callable[[Build], Make | None], Callable[[Build], dict[str, Tensor]]]:
    """How ranks and the reference begin from the job's `weights`, where it names some."""

    def make(build: Build) -> Make | None:
        return None if job.weights is None else given_weights(build, Path(job.weights))[0]

    def whole(build: Build) -> dict[str, Tensor]:
        read = make(build)
        found: dict[str, Tensor] = {}
        if read is not None:
            named = [("model", n, t) for n, t in build.model.parameters.items()]
            named += [("buffer", n, t) for n, t in build.model.buffers.items()]
            for kind, name, fake in named:
                part = read(f"{kind}/{name}", fake, tuple((0, size) for size in fake.shape))
                if part is not None:
                    found[f"{kind}/{name}"] = part
        return found

    return make, whole


def verify_local(job: Job, plan: Plan, ranks: int, steps: int, dtype: str) -> dict[str, Any]:
    """Verify with all ranks in this thread, in lockstep; where it fails, name the first op."""
    wide = torch.float64 if dtype == "float64" else None
    build = prepare(job, plan, ranks, wide)
    data = job.data()
    make, whole = _started(job)
    policy = Policy(job.clip_norm)
    start = whole(build)

    def crew() -> list[Worker]:
        read = make(build)
        return [Worker(build, r, _source(job, data), policy, read) for r in range(ranks)]

    workers = crew()
    reference = reference_for(build, _source(job, data), start=start)
    reports = [Report() for _ in workers]
    world = LocalWorld(ranks)
    world.perform(
        [verify_rank(w, reference, steps, r) for w, r in zip(workers, reports, strict=True)]
    )
    report = LocalWorld(ranks).perform(
        [merge(r, w) for w, r in zip(workers, reports, strict=True)]
    )[0]
    if dtype == "float32":
        flipped = reference_for(build, _source(job, data), start=start, flipped=True)
        first = reference_for(build, _source(job, data), start=start)
        report = _first_step_only(report, reports)
        report.limits = float32_limits(first.after(0), flipped.after(0))
    elif report.failing == ("weights",):
        flipped = reference_for(build, _source(job, data), start=start, flipped=True)
        first = reference_for(build, _source(job, data), start=start)
        report.rounding = own_rounding(first, flipped, steps, report.over)
    outcome = _outcome(build, report, steps, dtype)
    if not report.passed:
        outcome["first_difference"] = first_difference(build, crew())
    return outcome


def _first_step_only(report: Report, reports: Sequence[Report]) -> Report:
    """In float32 only the first step's gradients have a law: later ones follow other weights."""
    found = Report(worst=dict(report.worst))
    firsts = [r.first_gradients for r in reports]
    found.worst["gradients"] = max(firsts, key=lambda w: order(w.error))
    return found


def verify_session(job: Job, plan: Plan, comm: Comm, steps: int, dtype: str) -> dict[str, Any]:
    """Verify with real processes: each compares its own parts with a reference of its own."""
    wide = torch.float64 if dtype == "float64" else None
    build = prepare(job, plan, comm.world.size, wide)
    data = job.data()
    make, whole = _started(job)
    start = whole(build)
    worker = Worker(build, comm.world.rank, _source(job, data), Policy(job.clip_norm), make(build))
    reference = reference_for(build, _source(job, data), start=start)
    report = Report()
    comm.perform(verify_rank(worker, reference, steps, report))
    if dtype == "float32":
        flipped = reference_for(build, _source(job, data), start=start, flipped=True)
        first = reference_for(build, _source(job, data), start=start)
        report = _first_step_only(report, [report])
        report.limits = float32_limits(first.after(0), flipped.after(0))
    report = comm.perform(merge(report, worker))
    if dtype == "float64" and report.failing == ("weights",):  # so on every rank, or on none
        flipped = reference_for(build, _source(job, data), start=start, flipped=True)
        first = reference_for(build, _source(job, data), start=start)
        report.rounding = own_rounding(first, flipped, steps, report.over)
    return _outcome(build, report, steps, dtype)
