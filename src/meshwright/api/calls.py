"""What users call once: `train`, `verify`, `explain`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from meshwright.api.plans import plan_of
from meshwright.api.run import Run
from meshwright.errors import UsageError
from meshwright.job import Job
from meshwright.launch.connect import connect
from meshwright.launch.contract import here
from meshwright.launch.worker import ending
from meshwright.plan.plan import Plan
from meshwright.plan.size import parse_bytes
from meshwright.plan.toml import parse_plan
from meshwright.run.describe import explain as describe
from meshwright.run.equality.verify import verify_local, verify_session
from meshwright.run.step import Metrics
from meshwright.view.limits import require_limits

__all__ = ["explain", "train", "verify"]


def explain(
    job: Job,
    plan: str | Plan = "auto",
    *,
    ranks: int | None = None,
    max_bytes: int | str | None = None,
    memory: int | str | None = None,
) -> dict[str, Any]:
    """What a plan makes every rank hold and move, and why, without starting any.

    In a test of yours, `mw.explain(job, "zero3,data=4", max_bytes="2MiB")` holds a budget.

    Args:
        job: that would be trained.
        plan: as for `Run`.
        ranks: there are; by default as many as the plan names.
        max_bytes: that a rank may move in a step: a number of bytes, or text such as `2MiB`.
        memory: that a rank has, likewise.

    Returns:
        What `mw plan --json` prints: `traffic` in all, `collectives`, `fallbacks`, `conflicts`,
        `layouts`, `block`, `memory` and more; docs/explain.md says what is in each.

    Raises:
        PlanError: the plan cannot be laid out, or is over a limit; then with the list of what it
            moves or needs, largest first, and what to change.
    """
    asked = plan if isinstance(plan, Plan) else parse_plan(plan, lambda p: Path(p).read_text())
    size = ranks or (asked.ranks if isinstance(asked, Plan) else 1)
    laid = plan_of(plan, job, size)
    found = describe(job, laid, size)
    limits = {"max_bytes": max_bytes, "memory": memory}
    sizes = {name: parse_bytes(limit, name) for name, limit in limits.items() if limit is not None}
    require_limits(job, laid, found, **sizes)
    return found


def train(
    job: Job,
    steps: int | None = None,
    plan: str | Plan = "auto",
    *,
    evaluate_every: int | None = None,
    checkpoint_every: int | None = None,
    on_step: Sequence[Callable[[Run, Metrics], None]] = (),
    **how: Any,
) -> dict[str, Any]:
    """Train a job from its start (or its newest checkpoint) to its end.

    Args:
        job: what to train.
        steps: in all; by default the job's `steps` or `epochs`.
        plan: as for `Run`.
        evaluate_every: steps between evaluations; the job's held-out set is also evaluated last.
        checkpoint_every: steps between checkpoints, beside one every ten minutes and the last.
        on_step: called as `fn(run, metrics)` after every step, on every rank.
        **how: as for `Run`.

    Returns:
        A summary: `run_dir`, `steps`, `loss` (`losses` by phase, where the job has
        some), `evaluation`, `plan`, `ranks`.
    """
    with Run(job, plan, **how) as run:
        waits = bool(how.get("wait_for_saves"))
        loss: float | None = None
        losses: dict[str, float] = {}
        evaluation: dict[str, float] | None = None
        for _ in run.steps(until=steps):
            metrics = run.step()
            loss = metrics.loss
            losses |= {metrics.phase: loss} if metrics.phase else {}
            for function in on_step:
                function(run, metrics)
            if checkpoint_every and not waits:
                run.session.prepare_saves()
            if checkpoint_every and run.step_number % checkpoint_every == 0:
                run.save(wait=waits)
            if evaluate_every and run.step_number % evaluate_every == 0:
                evaluation = run.evaluate()
        if job.evaluation is not None and not (
            evaluate_every and evaluation and run.step_number % evaluate_every == 0
        ):
            evaluation = run.evaluate()
        run.save(last=True)
        return {
            "run_dir": str(run.dir),
            "steps": run.step_number,
            "loss": loss,
            **({"losses": losses} if losses else {}),
            "evaluation": evaluation,
            "plan": run.plan.label,
            "ranks": run.plan.ranks,
        }


def verify(
    job: Job,
    plan: str | Plan = "auto",
    *,
    steps: int = 5,
    ranks: int | None = None,
    dtype: Literal["float64", "float32"] = "float64",
) -> dict[str, Any]:
    """Run `steps` steps under a plan and compare every tensor with eager code on one device.

    In a world of one, the plan's ranks run in this thread; under a launcher, each process is one.
    A plan that computes in 16 bits is verified in float64, without its rounding, and as it does;
    `dtype="float32"` leaves the former out.

    Returns:
        `passed`, `plan`, `ranks`, `steps`, `dtype`, `worst_relative_error`, `worst_tensor`, `law`,
        and, where it failed in one thread, `first_difference`.
    """
    if steps < 1:
        raise UsageError(f"steps={steps}; verify at least 1 step")
    if dtype not in ("float64", "float32"):
        raise UsageError(f"dtype={dtype!r}; verify in 'float64' or 'float32'")
    contract = here()
    if contract.world.size == 1:
        found = plan if isinstance(plan, Plan) else parse_plan(plan, lambda p: Path(p).read_text())
        asked = found if isinstance(found, Plan) else Plan()
        size = ranks or (2 * asked.ranks if asked.fills else asked.ranks)
        return verify_local(job, asked.filled(size), size, steps, dtype)
    comm = connect(contract)
    with contextlib.closing(comm), ending(contract, comm):
        laid = plan_of(contract.plan or plan, job, contract.world.size)
        return verify_session(job, laid, comm, steps, dtype)
