"""Verify: a plan's numbers against one device's, tensor by tensor, step by step.

Error of a tensor = max|a-b| / max(max|b|, 1e-3 r), r the root mean square over all elements of its
kind (gradients, weights, each optimizer slot): biases before a norm have true gradient zero, and
plain relative error would compare noise with noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meshwright.comm.base import Comm, gather_json
from meshwright.comm.local import LocalWorld
from meshwright.compile.example import example_of
from meshwright.compile.random import SampleDim
from meshwright.job import Job
from meshwright.plan.plan import Plan
from meshwright.program.layout import Layout, region
from meshwright.run.build import Build, Micro, prepare
from meshwright.run.data import Source, open_source
from meshwright.run.lockstep import first_difference
from meshwright.run.persist import given_weights
from meshwright.run.reference import Reference, Snapshot, slots
from meshwright.run.step import Policy
from meshwright.run.worker import Make, Worker, box

__all__ = ["KINDS", "LAW", "Report", "Worst", "compare", "reference_for", "verify_rank"]

KINDS = ("loss", "gradients", "weights", "optimizer")
LAW = 1e-10
"""Largest relative error in float64."""


@dataclass(frozen=True, slots=True)
class Worst:
    """The largest error of a kind, and whose it is."""

    error: float = 0.0
    tensor: str = ""
    step: int = 0

    def worse(self, other: Worst) -> Worst:
        """The larger of two; NaN is the largest."""
        larger = math.isnan(other.error) or other.error > self.error
        return other if larger and not math.isnan(self.error) else self


@dataclass(slots=True)
class Report:
    """Worst errors by kind over all ranks and steps, and the limits that they must keep."""

    worst: dict[str, Worst] = field(default_factory=lambda: dict.fromkeys(KINDS, Worst()))
    limits: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, LAW))
    first_gradients: Worst = Worst()

    @property
    def passed(self) -> bool:
        """Whether every kind is within its limit."""
        return all(self.worst[kind].error <= self.limits[kind] for kind in self.limits)

    @property
    def worst_tensor(self) -> Worst:
        """The tensor furthest over (or nearest to) its limit."""
        kind = max(self.limits, key=lambda k: _order(self.worst[k].error / self.limits[k]))
        return self.worst[kind]

    def add(self, kind: str, error: float, tensor: str, step: int) -> None:
        """Take one tensor's error in."""
        self.worst[kind] = self.worst[kind].worse(Worst(error, tensor, step))


def _order(error: float) -> float:
    return math.inf if math.isnan(error) else error


def scales(tensors: Mapping[str, Tensor], kind_of: Callable[[str], str]) -> dict[str, float]:
    """Per kind, 1e-3 of the root mean square over all its elements."""
    squares: dict[str, float] = {}
    counts: dict[str, int] = {}
    for name, tensor in tensors.items():
        kind = kind_of(name)
        squares[kind] = squares.get(kind, 0.0) + float(tensor.to(torch.float64).square().sum())
        counts[kind] = counts.get(kind, 0) + tensor.numel()
    return {kind: 1e-3 * math.sqrt(squares[kind] / max(1, counts[kind])) for kind in squares}


def compare(
    parts: Mapping[str, Tensor],
    whole: Mapping[str, Tensor],
    bounds: Callable[[str, Tensor], tuple[tuple[int, int], ...]],
    kind_of: Callable[[str], str],
) -> dict[str, float]:
    """Error of each of a rank's parts against its region of the whole tensors.

    A name that only one side has is an infinite error.
    """
    floors = scales(whole, kind_of)
    found = dict.fromkeys(set(parts) ^ set(whole), math.inf)
    for name in set(parts) & set(whole):
        reference = whole[name].to(torch.float64)
        part = box(reference, bounds(name, reference)) if reference.dim() else reference
        if part.shape != parts[name].shape:
            found[name] = math.inf
            continue
        if not part.numel():
            continue
        floor = max(float(reference.abs().max()), floors[kind_of(name)])
        difference = float((parts[name].to(torch.float64) - part).abs().max())
        found[name] = difference / floor if floor else difference
    return found


def _slot_of(name: str) -> str:
    """The kind of `optimizer/<slot>/<parameter>`: its slot."""
    return name.split("/")[1]


def reference_for(build: Build, source: Source, **how: Any) -> Reference:
    """The reference of a build, counting random ops' samples as its programs do."""

    def draws(tree: Any, samples: int) -> Sequence[SampleDim | None]:
        return build.unit(Micro(example_of(tree)[0], samples)).draws

    return Reference(
        build.job, build.model, source, build.plan.microbatches, draws, build.dtype, **how
    )


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
    whole = Report(limits=report.limits)
    for found in everyone:
        for kind, (error, tensor, step) in found.items():
            whole.add(kind, math.inf if error < 0 else error, tensor, step)
    return whole


def float32_limits(first: Snapshot, flipped: Snapshot) -> dict[str, float]:
    """Limits in float32: the loss to 1e-5, first-step gradients to the reference's own rounding.

    The reference's own error is measured between two orders of summation (samples reversed).
    """

    def bounds(_: str, tensor: Tensor) -> tuple[tuple[int, int], ...]:
        return tuple((0, size) for size in tensor.shape)

    own = compare(flipped.gradients, first.gradients, bounds, lambda _: "gradients")
    return {"loss": 1e-5, "gradients": max(1e-5, 4 * max(own.values(), default=0.0))}


def amplified(first: Reference, flipped: Reference, steps: int) -> float:
    """The limit of weights in float64 where an optimizer blows rounding up.

    A key bias, or a bias before a norm, has true gradient zero; Adam divides what rounding leaves
    of it by its eps. So where weights alone pass the law, they are held to 4 times what the
    reference itself differs by between two orders of summation. More than 1e-6 of that would
    measure nothing: the law stands.
    """
    own = 0.0
    for step in range(steps):
        found = compare(
            flipped.after(step).weights,
            first.after(step).weights,
            lambda _, tensor: tuple((0, size) for size in tensor.shape),
            lambda name: name.partition("/")[0],
        )
        own = max(own, *found.values(), 0.0)
    return max(LAW, 4 * own) if own <= 1e-6 else LAW


def _weights_alone_fail(report: Report) -> bool:
    over = {kind for kind in report.limits if not report.worst[kind].error <= report.limits[kind]}
    return over == {"weights"}


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
    elif _weights_alone_fail(report):
        flipped = reference_for(build, _source(job, data), start=start, flipped=True)
        first = reference_for(build, _source(job, data), start=start)
        report.limits["weights"] = amplified(first, flipped, steps)
    outcome = _outcome(build, report, steps, dtype)
    if not report.passed:
        outcome["first_difference"] = first_difference(build, crew())
    return outcome


def _first_step_only(report: Report, reports: Sequence[Report]) -> Report:
    """In float32 only the first step's gradients have a law: later ones follow other weights."""
    found = Report(worst=dict(report.worst))
    firsts = [r.first_gradients for r in reports]
    found.worst["gradients"] = max(firsts, key=lambda w: _order(w.error))
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
    if dtype == "float64" and _weights_alone_fail(report):  # so on every rank, or on none
        flipped = reference_for(build, _source(job, data), start=start, flipped=True)
        first = reference_for(build, _source(job, data), start=start)
        report.limits["weights"] = amplified(first, flipped, steps)
    return _outcome(build, report, steps, dtype)
