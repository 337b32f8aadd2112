"""Whether a plan fits a world and a batch: a table of small named checks.

Every check is a pure function of the plan and the facts; `require` raises all that fail at once.
"""

from __future__ import annotations

from typing import Final

from meshwright.errors import PlanError
from meshwright.plan.facts import Check, Facts, Problem
from meshwright.plan.offloaded import offload_is_known
from meshwright.plan.piped import (
    actions_are_of_ranks,
    cuts_make_the_stages,
    old_gradients_are_used_as_they_come,
    pipeline_has_stages,
    replicas_are_of_stages,
    schedule_holds_the_stages,
)
from meshwright.plan.plan import Plan
from meshwright.plan.remat import remat_is_known
from meshwright.plan.sliced import slices_are_made

__all__ = ["CHECKS", "Facts", "Problem", "check", "require"]


def check(plan: Plan, facts: Facts) -> tuple[Problem, ...]:
    """Every reason why `plan` (with `data` filled) cannot be laid over `facts`; empty if it can."""
    return tuple(problem for find in CHECKS.values() for problem in find(plan, facts))


def require(plan: Plan, facts: Facts) -> None:
    """Return if `plan` fits.

    Raises:
        PlanError: naming every problem, one a line where there are several.
    """
    problems = check(plan, facts)
    if len(problems) == 1:
        raise PlanError(str(problems[0]))
    if problems:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise PlanError(f"plan has {len(problems)} problems:{listed}")


def world_is_filled(plan: Plan, facts: Facts) -> tuple[Problem, ...]:
    """The product of the mesh axes is the number of ranks there are."""
    if plan.ranks == facts.world:
        return ()
    if plan.replicas is not None:
        return (_replicated_world(plan, facts.world),)
    sizes = {axis: size for axis, size in plan.sizes.items() if size > 1 or axis == "data"}
    asked = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    others = plan.ranks // plan.sizes["data"]
    fitting, left = divmod(facts.world, others)
    use = "" if left else f"use data={fitting}, or "
    return (
        Problem(
            f"plan asks for {asked} = {_ranks(plan.ranks)}, but the world has {facts.world}",
            f"{use}start {_ranks(plan.ranks)}",
        ),
    )


def _replicated_world(plan: Plan, world: int) -> Problem:
    """The stages' data ranks, times what each is split over, are not what there is."""
    within = {axis: size for axis, size in plan.sizes.items() if size > 1 and axis != "pipeline"}
    asked = "".join(f" x {axis}={size}" for axis, size in within.items() if axis != "data")
    return Problem(
        f"plan asks for replicas={plan.replicas}{asked} = {_ranks(plan.ranks)}, but the world has "
        f"{world}",
        f"start {_ranks(plan.ranks)}",
    )


def microbatches_hold_samples(plan: Plan, facts: Facts) -> tuple[Problem, ...]:
    """Every rank of the data axis, and of expert, gets a sample or more of every micro-batch.

    Replicas of a stage take whole micro-batches in turn.
    """
    batch, parts, expert = facts.batch_size, plan.microbatches, plan.sizes["expert"]
    ranks = plan.sizes["data"] * expert
    if batch is None or batch // parts >= ranks:
        return ()
    asked = f"data={plan.sizes['data']}" + (f" x expert={expert}" if expert > 1 else "")
    if batch < ranks:
        whole = " and microbatches=1" if parts > 1 else ""
        fits = f"data={batch // expert}" if batch >= expert else f"data=1,expert={batch}"
        return (
            Problem(
                f"batch_size={batch} has fewer samples than {asked} has ranks",
                f"use {fits} or fewer{whole}, or batch_size={parts * ranks} or more",
            ),
        )
    smallest = f"the smallest has {batch // parts}" if batch >= parts else "some have none"
    return (
        Problem(
            f"microbatches={parts} splits batch_size={batch} so that {smallest}, "
            f"but {asked} needs at least {ranks} in each",
            f"use microbatches={batch // ranks} or fewer, or batch_size={parts * ranks} or more",
        ),
    )


def batch_norm_keeps_its_samples(plan: Plan, facts: Facts) -> tuple[Problem, ...]:
    """A micro-batch is exactly the samples whose statistics a batch norm shares."""
    batch, over = facts.batch_size, facts.normalize_over
    if batch is None or not (facts.normalizes or over):
        return ()
    over = over or batch
    if plan.microbatches * over == batch:
        return ()
    shares = (
        f"normalize_over={over}"
        if facts.normalize_over
        else f"batch norm shares the statistics of the whole batch_size={batch}"
    )
    return (
        Problem(
            f"{shares}, but microbatches={plan.microbatches} would split batch_size={batch} "
            "otherwise",
            f"use microbatches={batch // over}"
            if facts.normalize_over or batch % plan.microbatches
            else f"use microbatches=1, or say normalize_over={batch // plan.microbatches} in the "
            "job, which changes the model's numbers",
        ),
    )


def shards_divide_the_data_axis(plan: Plan, facts: Facts) -> tuple[Problem, ...]:
    """Groups that share state are as large as said, all of them."""
    del facts
    shard, data = plan.shard, plan.sizes["data"]
    if shard is None:
        return ()
    if data % shard:
        fits = max(size for size in range(1, shard + 1) if data % size == 0)
        return (
            Problem(
                f"plan asks for shard={shard}, which does not divide data={data}",
                f"use shard={fits}, or drop shard",
            ),
        )
    if not plan.zero:
        return (
            Problem(
                f"plan asks for shard={shard} without ZeRO, but nothing is sharded then",
                "use zero3, zero2 or zero1, or drop shard",
            ),
        )
    return ()


def sequences_are_split_over_something(plan: Plan, facts: Facts) -> tuple[Problem, ...]:
    """The axis that activations are split over is there."""
    del facts
    if plan.sequence != "tensor" or plan.tensor > 1:
        return ()
    return (
        Problem(
            "plan asks for sequence=tensor, but tensor=1",
            "use tensor=2 or more, or drop sequence; sequences alone are split by context=2",
        ),
    )


def attention_has_a_context(plan: Plan, facts: Facts) -> tuple[Problem, ...]:
    """How attention meets split sequences is said only where they are split."""
    del facts
    if plan.attention is None or plan.context > 1:
        return ()
    return (
        Problem(
            f"plan asks for attention={plan.attention}, but sequences are whole with context=1",
            "use context=2 or more, or drop attention",
        ),
    )


def gathers_are_there(plan: Plan, facts: Facts) -> tuple[Problem, ...]:
    """When weights are gathered is said only where they are sharded, and may be so."""
    del facts
    if plan.gather is None:
        return ()
    asked = f"plan asks for gather={plan.gather}"
    if not plan.zero:
        return (
            Problem(
                f"{asked} without ZeRO, but no weights are gathered then",
                "use zero3, zero2 or zero1, or drop gather",
            ),
        )
    if plan.zero < 3 and plan.gather == "microbatch":
        return (
            Problem(
                f"{asked} with zero={plan.zero}, but its weights lie whole on every rank between "
                "steps",
                "use zero3, or drop gather",
            ),
        )
    return ()


def reductions_are_of_one_step(plan: Plan, facts: Facts) -> tuple[Problem, ...]:
    """When gradients are reduced is said only where a step's micro-batches all go to all ranks."""
    del facts
    asked = f"plan asks for reduce={plan.reduce}"
    if plan.reduce is not None and plan.asynchronous:
        rule = f"schedule={plan.schedule} updates without waiting for a step's gradients"
        return (Problem(f"{asked}, but {rule}", "drop reduce, or use schedule=1f1b"),)
    if plan.reduce == "microbatch" and plan.replicas is not None:
        rule = f"replicas={plan.replicas} take whole micro-batches in turn, and sum once a step"
        return (Problem(f"{asked}, but {rule}", "drop reduce, or use data in place of replicas"),)
    return ()


# What this version runs, of the keys whose other values are still to come.
RUNS: Final[dict[str, tuple[int | str | None, ...]]] = {
    "sequence": ("none", "tensor"),
    "precision": ("float32", "bf16", "fp16", "bf16-pure"),
    "regime": ("bsp",),
    "codec": ("none",),
    "redundancy": (0,),
}


# What else is meant by, or serves in place of, a value that this version does not run.
REMEDIES: Final[dict[tuple[str, int | str | None], str]] = {
    **{("precision", word): "write precision=bf16" for word in ("bfloat16", "bf16-mixed")},
    **{("precision", word): "drop precision, which is float32" for word in ("fp32", "float", "32")},
    **{("precision", word): "write precision=fp16" for word in ("float16", "half", "16")},
    **{("precision", word): "write precision=fp16" for word in ("fp16-mixed", "16-mixed")},
    **{("precision", word): "write precision=bf16-pure" for word in ("bf16-true", "pure-bf16")},
}


def rounded_state_is_at_hand(plan: Plan, facts: Facts) -> tuple[Problem, ...]:
    """State that is rounded as it is written lies with the rank that rounds it."""
    del facts
    if plan.precision != "bf16-pure" or plan.offload == "none":
        return ()
    return (
        Problem(
            f"plan asks for precision=bf16-pure with offload={plan.offload}, but what is offloaded "
            "is stepped where it lies, which does not round it",
            "use precision=bf16, or drop offload",
        ),
    )


def version_runs_it(plan: Plan, facts: Facts) -> tuple[Problem, ...]:
    """Every value is one that this version of Meshwright runs."""
    del facts  # it does not depend on the world
    return tuple(
        Problem(
            f"plan asks for {key}={plan.value(key)}, but {_only(key, runs)}",
            REMEDIES.get((key, plan.value(key)), f"drop {key}"),
        )
        for key, runs in RUNS.items()
        if plan.value(key) not in runs
    )


def _only(key: str, runs: tuple[int | str | None, ...]) -> str:
    values = " or ".join(f"{key}={value}" for value in runs if value is not None)
    return f"this version runs {values or 'its default'} only"


def _ranks(count: int) -> str:
    return f"{count} rank" if count == 1 else f"{count} ranks"


CHECKS: Final[dict[str, Check]] = {
    "world": world_is_filled,
    "samples": microbatches_hold_samples,
    "pipeline": pipeline_has_stages,
    "schedule": schedule_holds_the_stages,
    "actions": actions_are_of_ranks,
    "cuts": cuts_make_the_stages,
    "replicas": replicas_are_of_stages,
    "asynchronous": old_gradients_are_used_as_they_come,
    "gather": gathers_are_there,
    "reduce": reductions_are_of_one_step,
    "shard": shards_divide_the_data_axis,
    "sequence": sequences_are_split_over_something,
    "attention": attention_has_a_context,
    "slices": slices_are_made,
    "batch norm": batch_norm_keeps_its_samples,
    "remat": remat_is_known,
    "offload": offload_is_known,
    "rounding": rounded_state_is_at_hand,
    "version": version_runs_it,
}
