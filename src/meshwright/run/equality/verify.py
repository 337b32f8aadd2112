"""Verify: a plan's numbers against one device's, tensor by tensor, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meshwright.comm.base import Comm, gather_json
from meshwright.comm.local import LocalWorld
from meshwright.job import Job
from meshwright.plan.plan import Plan
from meshwright.program.layout import Layout
from meshwright.run import averaged
from meshwright.run.build import Build, has_batch_norm
from meshwright.run.data.samples import Source, open_source
from meshwright.run.equality.begin import DRAINS, reference_of
from meshwright.run.equality.lockstep import first_difference
from meshwright.run.equality.measure import KINDS, LAW, Report, Worst, compare
from meshwright.run.equality.reference import Reference, Snapshot, slots
from meshwright.run.equality.rounding import (
    allow_zeros,
    float32_limits,
    own_rounding,
    same_sums,
    settle_short,
    short_report,
)
from meshwright.run.given import given_weights
from meshwright.run.part import part_of
from meshwright.run.phased import worker_for
from meshwright.run.phases import builds_of
from meshwright.run.same import under
from meshwright.run.step import Metrics, Policy, RankState
from meshwright.run.worker import Make, Worker

__all__ = [
    "KINDS",
    "LAW",
    "Report",
    "Trial",
    "merge",
    "try_local",
    "verify_local",
    "verify_rank",
    "verify_session",
]


def _slot_of(name: str) -> str:
    """The kind of `optimizer/<slot>/<parameter>`: its slot."""
    return name.split("/")[1]


def verify_rank(
    worker: Worker, reference: Reference, steps: int, report: Report
) -> Generator[Any, Any, None]:
    """Run `steps` steps on this rank and put every error against the reference into `report`."""
    worker.keep_gradients, worker.until = {}, steps
    fetched = yield from worker.agree_on_shapes(worker.fetch(0))
    for step in range(steps):
        if step in DRAINS:
            yield from worker.drain()
        upcoming = step + 1 if step + 1 < steps else None
        worker.turn_at(step)
        metrics, _ = yield from worker.step(fetched, upcoming)
        snapshot = reference.after(step)
        scaled = metrics.loss_scale, metrics.overflowed
        if snapshot.loss_scale is not None and scaled != (snapshot.loss_scale, snapshot.skipped):
            report.add("loss scale", math.inf, "loss scale", step)
        if snapshot.gain is not None and worker.build.dtype is not None:
            _compare_gains(metrics, snapshot, step, report)
        if report.first is None and not metrics.overflowed:
            report.first = step
        compare_step(worker, metrics.loss, snapshot, step, report)
        if worker.ahead is not None:
            fetched = worker.ahead


def _compare_gains(metrics: Metrics, snapshot: Snapshot, step: int, report: Report) -> None:
    """Put AdaScale's errors into the report."""
    for name, ours, theirs in (
        ("gain", metrics.gain, snapshot.gain),
        ("iterations", metrics.iterations, snapshot.iterations),
    ):
        error = math.inf if not ours or not theirs else abs(ours - theirs) / theirs
        report.add("optimizer", error, f"adascale's {name}", step)


def compare_step(
    worker: Worker, loss: float, snapshot: Snapshot, step: int, report: Report
) -> None:
    """Put the errors of one step into the report."""
    build, place = worker.build, worker.place

    averages = {
        name: one.states[name].optimizer
        for one, own in worker.phases.values()
        for name in (own.average.tensors if own.average is not None else ())
    }

    def lies(name: str, *, optimizer: bool) -> Layout | None:
        states = build.states.get(name)
        if optimizer and name in averages:
            return averages[name]
        return None if states is None else states.optimizer if optimizer else states.weights

    def part(name: str, tensor: Tensor, *, optimizer: bool) -> Tensor:
        layout = lies(name, optimizer=optimizer)
        if layout is None or tensor.shape != build.model.parameters[name].shape:
            return tensor
        return part_of(tensor, layout, build.axes, place.coordinates)

    floor = max(abs(snapshot.loss), 1e-300)
    report.add("loss", abs(loss - snapshot.loss) / floor, "loss", step)
    found = compare(
        worker.keep_gradients or {},
        snapshot.gradients,
        lambda name, t: part(name, t, optimizer=True),
        lambda _: "gradients",
        report.floor,
        lambda name: build.holds(worker.rank, f"model/{name}"),
    )
    for name, error in found.items() if step == report.first or not report.first_only else ():
        report.add("gradients", error, name, step)
    state = {n: t for n, t in worker.state.values.items() if n.startswith(("model/", "buffer/"))}
    state |= {name: tensor for name, _, _, tensor in averaged.held(worker)}
    found = compare(
        state,
        snapshot.weights,
        lambda name, t: part(
            "" if name.startswith("buffer/") else name.partition("/")[2],
            t,
            optimizer=name.startswith("ema/"),
        ),
        lambda name: name.partition("/")[0],
        held=lambda name: build.holds(worker.rank, name.replace("ema/", "model/", 1)),
    )
    for name, error in found.items():
        report.add("weights", error, name.removeprefix("model/").removeprefix("buffer/"), step)
    for phase in worker.phases:
        _compare_optimizer(worker, phase, snapshot, step, report)


def _compare_optimizer(
    worker: Worker, phase: str, snapshot: Snapshot, step: int, report: Report
) -> None:
    build, state = worker.phases[phase]
    names, begin = {id(p): name for name, p in state.shards.items()}, under(phase)
    wanted = {
        f"optimizer/{name.removeprefix(begin)}": tensor
        for name, tensor in snapshot.optimizer.items()
        if name.startswith(begin)
    }
    found = compare(
        slots(state.optimizer, names),
        wanted,
        lambda name, t: part_of_slot(worker, build, state, name, t),
        _slot_of,
        held=lambda name: build.holds(worker.rank, f"model/{name.split('/', 2)[2]}"),
    )
    for name, error in found.items():
        whole = begin + name.removeprefix("optimizer/")
        report.add("optimizer", error, whole.removeprefix("optimizer/"), step)


def part_of_slot(
    worker: Worker, build: Build, state: RankState, name: str, whole: Tensor
) -> Tensor:
    """What a rank holds of a tensor of the optimizer's state."""
    _, slot, bare = name.split("/", 2)
    shape = tuple(whole.shape)
    alike = shape == build.model.parameters[bare].shape
    layout = build.states[bare].optimizer if alike else Layout()
    joint = state.joint.layout(bare, slot, whole)
    if joint is not None:
        layout = joint[1]
    return part_of(whole, layout, build.axes, worker.place.coordinates)


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
        "verify's report of rounding",
    )
    whole = replace(report, worst=dict.fromkeys(report.worst, Worst()), over={})
    for found in everyone:
        for kind, (error, tensor, step) in found.items():
            whole.add(kind, math.inf if error < 0 else error, tensor, step)
    for over in overs:
        for name, error in over.items():
            whole.add(whole.explains, math.inf if error < 0 else error, name, 0)
    return whole


@dataclass(frozen=True, slots=True)
class Trial:
    """A plan to verify: its build by phase, its data, where ranks and the reference begin.

    Attributes:
        start: whole tensors of the job's `weights`, by global name.
    """

    job: Job
    builds: Mapping[str, Build]
    data: Any
    start: dict[str, Tensor]

    @classmethod
    def of(cls, job: Job, plan: Plan, ranks: int, dtype: str) -> Trial:
        """A trial in float64, or as the plan computes (`float32`)."""
        builds = builds_of(job, plan, ranks, torch.float64 if dtype == "float64" else None)
        return cls(job, builds, job.data(), _start(job, next(iter(builds.values()))))

    @property
    def build(self) -> Build:
        """Of the job, or of its first phase."""
        return next(iter(self.builds.values()))

    @property
    def rounds(self) -> bool:
        """Whether the plan computes in less than its state's precision, here too."""
        return self.build.dtype is None and self.build.precision.short

    def source(self) -> Source:
        """The data, from its beginning."""
        job = self.job
        return open_source(self.data, batch_size=job.batch_size, seed=job.seed, collate=job.collate)

    def worker(self, rank: int) -> Worker:
        """A rank at step 0."""
        return worker_for(
            self.job,
            self.builds,
            rank,
            self.source(),
            Policy(self.job.clip_norm),
            _given(self.job, self.build),
        )

    def reference(self, **how: Any) -> Reference:
        """The user's code at step 0."""
        return reference_of(self.job, self.builds, self.source(), start=self.start, **how)

    def report(self) -> Report:
        """An empty report, with what is to be in it."""
        return (
            short_report(self.build.precision)
            if self.rounds
            else Report(first_only=self.build.dtype is None)
        )

    def settle(self, report: Report, steps: int) -> None:
        """Take in what the law allows for the reference's own rounding."""
        if self.rounds:
            settle_short(report, self.reference(), self.other_orders(), steps)
            if report.over and not report.passed:
                exact = self.reference(dtype=torch.float64).after(report.first or 0)
                allow_zeros(report, exact.gradients)
        elif self.build.dtype is None:
            first, other = self.reference(), self.reference(flipped=True)
            report.limits = float32_limits(first.after(0), other.after(0))
        elif report.failing == ("weights",):  # so on every rank, or on none
            flipped = self.reference(flipped=True)
            report.rounding = own_rounding(self.reference(), flipped, steps, report.over)

    def other_orders(self) -> list[Reference]:
        """References that sum in other orders: samples flipped, and micro-batches half as large.

        The latter where float64 shows that they change nothing else, as they would for batch norm
        or a loss over pairs of samples.
        """
        found = [self.reference(flipped=True)]
        halves = {"microbatches": 2 * self.build.plan.microbatches}
        if halves["microbatches"] > self.job.batch_size or has_batch_norm(self.build.model.module):
            return found
        exact = self.reference(dtype=torch.float64).after(0)
        if same_sums(exact, self.reference(dtype=torch.float64, **halves).after(0)):
            found.append(self.reference(**halves))
        return found

    def outcome(self, report: Report, steps: int) -> dict[str, Any]:
        """The report as plain data."""
        worst = report.worst_tensor
        kinds = tuple(report.limits) if self.rounds else KINDS
        short = self.build.plan.precision if self.build.plan.precision != "float32" else "16 bits"
        name = f"{{}} in {short}".format if self.rounds else str
        return {
            "passed": report.passed,
            "plan": self.build.plan.label,
            "recurrence": self.build.plan.asynchronous,
            "ranks": self.build.mesh.size,
            "steps": steps,
            "dtype": short if self.rounds else "float32" if self.build.dtype is None else "float64",
            "worst_relative_error": {name(kind): report.worst[kind].error for kind in kinds},
            "worst_tensor": worst.tensor,
            "worst_step": worst.step,
            "law": {name(kind): limit for kind, limit in report.limits.items()},
            "rounding": {
                n: [e, report.rounding[n]] for n, e in report.over.items() if n in report.rounding
            },
        }


def _given(job: Job, build: Build) -> Make | None:
    """What reads the job's `weights`, where it names some."""
    return None if job.weights is None else given_weights(build, Path(job.weights))[0]


def _start(job: Job, build: Build) -> dict[str, Tensor]:
    """The job's `weights`, whole, for the reference."""
    read = _given(job, build)
    found: dict[str, Tensor] = {}
    if read is not None:
        named = [("model", n, t) for n, t in build.model.parameters.items()]
        named += [("buffer", n, t) for n, t in build.model.buffers.items()]
        for kind, name, fake in named:
            part = read(f"{kind}/{name}", fake, tuple((0, size) for size in fake.shape))
            if part is not None:
                found[f"{kind}/{name}"] = part
    return found


def verify_local(job: Job, plan: Plan, ranks: int, steps: int, dtype: str) -> dict[str, Any]:
    """Verify with all ranks in this thread, in lockstep; where it fails, name the first op.

    A plan that computes in 16 bits is verified in float64, the same ops without their rounding, and
    as it is; `float32` leaves the former out.
    """
    return _both(plan, dtype, lambda dtype: try_local(Trial.of(job, plan, ranks, dtype), steps))


def verify_session(job: Job, plan: Plan, comm: Comm, steps: int, dtype: str) -> dict[str, Any]:
    """Verify with real processes: each compares its own parts with a reference of its own."""
    ranks = comm.world.size
    return _both(
        plan, dtype, lambda dtype: _session(Trial.of(job, plan, ranks, dtype), comm, steps)
    )


def _both(plan: Plan, dtype: str, run: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    found = run(dtype)
    if not plan.short or dtype != "float64":
        return found
    rounded = run("float32")
    merged = {key: {**found[key], **rounded[key]} for key in ("worst_relative_error", "law")}
    worst = {key: rounded[key] for key in ("worst_tensor", "worst_step") if found["passed"]}
    passed = found["passed"] and rounded["passed"]
    rounding = {**found["rounding"], **rounded["rounding"]}
    dtypes = {"dtype": f"{dtype} and {rounded['dtype']}"}
    return {**found, **merged, **worst, **dtypes, "passed": passed, "rounding": rounding}


def try_local(trial: Trial, steps: int) -> dict[str, Any]:
    """Run a trial with all ranks in this thread; its outcome as `verify` gives it."""
    workers = [trial.worker(rank) for rank in range(trial.build.mesh.size)]
    reference, reports = trial.reference(), [trial.report() for _ in workers]
    pairs = list(zip(workers, reports, strict=True))
    LocalWorld(len(workers)).perform([verify_rank(w, reference, steps, r) for w, r in pairs])
    report = LocalWorld(len(workers)).perform([merge(r, w) for w, r in pairs])[0]
    trial.settle(report, steps)
    outcome = trial.outcome(report, steps)
    if not report.passed and not trial.rounds:
        crew = [trial.worker(worker.rank) for worker in workers]
        outcome["first_difference"] = _first_difference(trial, crew)
    return outcome


def _first_difference(trial: Trial, crew: Sequence[Worker]) -> dict[str, Any] | None:
    """The first op of a phase's first step that differs, of the first phase that has one."""
    for phase, build in trial.builds.items():
        for worker in crew:
            worker.turn(phase)
        if (found := first_difference(build, crew)) is not None:
            return found
    return None


def _session(trial: Trial, comm: Comm, steps: int) -> dict[str, Any]:
    worker, report = trial.worker(comm.world.rank), trial.report()
    comm.perform(verify_rank(worker, trial.reference(), steps, report))
    report = comm.perform(merge(report, worker))
    trial.settle(report, steps)
    return trial.outcome(report, steps)
