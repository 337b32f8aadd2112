"""Drive a plan and the eager reference side by side, in one thread, on tiny models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from meshwright.comm.local import LocalWorld
from meshwright.job import Job
from meshwright.plan.plan import Plan
from meshwright.program.assemble import complete_unit
from meshwright.run.asynchronous import worker_of
from meshwright.run.build import Build
from meshwright.run.data.samples import open_source
from meshwright.run.equality.begin import reference_for
from meshwright.run.equality.measure import KINDS, LAW, Report
from meshwright.run.equality.reference import Reference, Snapshot
from meshwright.run.equality.verify import Trial, merge, try_local, verify_rank
from meshwright.run.prepare import prepare
from meshwright.run.step import Policy
from meshwright.run.worker import Worker

STEPS = 5


class Played:
    """A reference whose snapshots are all kept, so that many plans compare with one run of it."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.seen: list[Snapshot] = []

    def after(self, step: int) -> Snapshot:
        """The state after `step`."""
        while len(self.seen) <= step:
            self.seen.append(self.reference.after(len(self.seen)))
        return self.seen[step]


@dataclass
class Case:
    """A job with what its plans have in common: data, traced units, references by micro-batches."""

    job: Job
    data: Any = None
    units: dict[Any, Any] = field(default_factory=dict)
    references: dict[Any, Played] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.data = self.job.data()

    def source(self) -> Any:
        """A source of batches over the one data value."""
        job = self.job
        return open_source(self.data, batch_size=job.batch_size, seed=job.seed, collate=job.collate)

    def build(self, asked: str | Plan, dtype: torch.dtype | None = torch.float64) -> Build:
        """The build under a plan; units traced for one plan serve the others of that dtype."""
        plan = asked if isinstance(asked, Plan) else Plan.parse(asked)
        units = self.units.setdefault(dtype, {})
        return prepare(
            self.job,
            plan,
            plan.ranks if plan.data or plan.ranks > 1 else 2,
            dtype,
            self.data,
            units,
        )

    def shared(self, build: Build) -> Build:
        """The build with the units that others of its dtype have traced."""
        build.units = self.units.setdefault(build.dtype, build.units)
        return build

    def reference(self, build: Build) -> Played:
        """The eager run with the plan's micro-batches."""
        key: Any = build.plan.microbatches, build.plan.precision, build.dtype
        key = build.plan if build.plan.asynchronous else key
        if key not in self.references:
            self.references[key] = Played(reference_for(build, self.source()))
        return self.references[key]

    def workers(self, build: Build) -> list[Worker]:
        """One per rank."""
        policy = Policy(self.job.clip_norm)
        ranks = range(build.mesh.size)
        return [worker_of(build, rank, self.source(), policy) for rank in ranks]

    def verify(
        self, asked: str | Plan, steps: int = STEPS, dtype: torch.dtype | None = torch.float64
    ) -> Report:
        """Run all ranks of the plan for `steps` steps against the reference."""
        build = self.build(asked, dtype)
        workers = self.workers(build)
        played: Any = self.reference(build)
        reports = [Report() for _ in workers]
        world = LocalWorld(len(workers))
        pairs = list(zip(workers, reports, strict=True))
        world.perform([verify_rank(worker, played, steps, report) for worker, report in pairs])
        merged: Report = world.perform([merge(report, worker) for worker, report in pairs])[0]
        return merged

    def rounded(self, plan_text: str, steps: int = 2) -> dict[str, Any]:
        """The outcome of a plan as it computes, its rounding against that of the reference."""
        plan = Plan.parse(plan_text)
        ranks = plan.ranks if plan.data is not None else 2 * plan.ranks
        trial = Trial.of(self.job, plan, ranks, "float32")
        self.shared(trial.build)
        return try_local(trial, steps)


def verify_local(
    job: Job,
    plan_text: str,
    steps: int = STEPS,
    dtype: torch.dtype | None = torch.float64,
) -> Report:
    """The report of a plan against eager one-device training, all ranks in this thread."""
    return Case(job).verify(plan_text, steps, dtype)


def unruled(case: Case, plan_text: str) -> set[str]:
    """Ops of the traced units that no rule knows, and that every rank therefore runs whole."""
    build = case.build(plan_text)
    return {
        op.name
        for unit in build.units.values()
        for op, rule in zip(
            unit.program.ops,
            complete_unit(unit.program, build.axes, build.states).rules,
            strict=True,
        )
        if not rule.known
    }


def assert_equal(report: Report) -> None:
    """Within the law, and not for want of having compared anything."""
    assert report.passed, told(report)
    assert all(report.limits[kind] == LAW for kind in KINDS)


def told(report: Report) -> str:
    """The worst errors, for a failing assertion."""
    return ", ".join(
        f"{k} {w.error:.1e} ({w.tensor}, step {w.step})" for k, w in report.worst.items()
    )
