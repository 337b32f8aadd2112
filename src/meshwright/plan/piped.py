"""Checks of what a plan says of its pipeline."""

from __future__ import annotations

from collections.abc import Iterator

from meshwright.errors import nearest
from meshwright.plan.facts import Facts, Problem
from meshwright.plan.named import CHUNKED, PAIRED, REPLICATED, SCHEDULES
from meshwright.plan.plan import Plan

__all__ = [
    "actions_are_of_ranks",
    "cuts_make_the_stages",
    "old_gradients_are_used_as_they_come",
    "pipeline_has_stages",
    "replicas_are_of_stages",
    "schedule_holds_the_stages",
]


def pipeline_has_stages(plan: Plan, facts: Facts) -> tuple[Problem, ...]:
    """What orders or cuts stages is said only where there are some."""
    del facts
    if plan.pipeline > 1:
        return ()
    asked: dict[str, str | None] = {
        "schedule": plan.schedule and f"schedule={plan.schedule}",
        "virtual": f"virtual={plan.virtual}" if plan.virtual > 1 else None,
        "replicas": plan.replicas and f"replicas={plan.replicas}",
        "cuts": f"cuts {list(plan.cuts)}" if plan.cuts else None,
        "actions": "actions of its own" if plan.actions else None,
    }
    count = plan.replicas.count("-") + 1 if plan.replicas else 0
    ranks = {"replicas": count, "cuts": len(plan.cuts) + 1, "actions": len(plan.actions)}
    return tuple(
        Problem(
            f"plan asks for {text}, but pipeline=1 is one stage, with nothing to cut or order",
            f"use pipeline={max(2, ranks.get(key, 2))}, or drop {key}",
        )
        for key, text in asked.items()
        if text
    )


def schedule_holds_the_stages(plan: Plan, facts: Facts) -> tuple[Problem, ...]:
    """The schedule is one there is, and holds as many stages on each rank as `virtual` says."""
    del facts
    name, virtual = plan.schedule, plan.virtual
    if name is not None and name not in SCHEDULES:
        return (Problem(f"plan asks for schedule={name}", nearest(name, SCHEDULES)),)
    if plan.pipeline == 1 or name is None:
        return ()
    asked = f"plan asks for schedule={name} with virtual={virtual}"
    if name == "interleaved" and virtual < 2:
        return (
            Problem(
                f"{asked}, but it is about several stages on each rank",
                "use virtual=2 or more, or schedule=1f1b",
            ),
        )
    if name in PAIRED and virtual > 2:
        return (
            Problem(
                f"{asked}, but it holds exactly two stages on each rank",
                "drop virtual, or use schedule=interleaved",
            ),
        )
    if name not in (*CHUNKED, *PAIRED) and virtual > 1:
        return (
            Problem(
                f"{asked}, but it holds one stage on each rank",
                "drop virtual, or use schedule=interleaved",
            ),
        )
    return ()


def actions_are_of_ranks(plan: Plan, facts: Facts) -> tuple[Problem, ...]:
    """A schedule of the user's own has a line for each pipeline rank, and no other beside it."""
    del facts
    if not plan.actions or plan.pipeline == 1:
        return ()
    lines = _count(len(plan.actions), "line")
    beside = {"schedule": plan.schedule, "replicas": plan.replicas}
    beside["virtual"] = str(plan.virtual) if plan.virtual > 1 else None
    found = [
        Problem(f"plan has actions and {key}={value}, but its actions say that", f"drop {key}")
        for key, value in beside.items()
        if value
    ]
    if len(plan.actions) != plan.pipeline:
        found.append(
            Problem(
                f"plan has actions of {lines}, but pipeline={plan.pipeline}",
                f"write one line for each pipeline rank, or use pipeline={len(plan.actions)}",
            )
        )
    return tuple(found)


def cuts_make_the_stages(plan: Plan, facts: Facts) -> tuple[Problem, ...]:
    """Every stage but the first is told where it begins, or none is."""
    del facts
    cuts, stages = len(plan.cuts), plan.stages
    if plan.pipeline == 1 or not cuts or cuts == stages - 1:
        return ()
    per_rank = stages // plan.pipeline
    each = f" with {per_rank} stages a rank" if per_rank > 1 else ""
    return (
        Problem(
            f"plan has {_count(cuts, 'cut')}, which {'make' if cuts > 1 else 'makes'} {cuts + 1} "
            f"stages, but pipeline={plan.pipeline}{each} has {stages}",
            f"name the first module of every stage but the first, {stages - 1} in all, or drop "
            "cuts to have them chosen",
        ),
    )


def replicas_are_of_stages(plan: Plan, facts: Facts) -> tuple[Problem, ...]:
    """Replicas are counted for every pipeline rank, where a schedule has a use for them."""
    del facts
    if plan.replicas is None or plan.pipeline == 1:
        return ()
    return tuple(_replicas(plan, f"plan asks for replicas={plan.replicas}"))


def _replicas(plan: Plan, asked: str) -> Iterator[Problem]:
    widths = plan.widths
    if len(widths) != plan.pipeline:
        yield Problem(
            f"{asked}, which is {_count(len(widths), 'stage')}, but pipeline={plan.pipeline}",
            f"use pipeline={len(widths)}, or give {plan.pipeline} numbers"
            if len(widths) > 1
            else f"give {plan.pipeline} numbers with dashes between them",
        )
    if plan.data is not None:
        yield Problem(
            f"{asked} and data={plan.data}, but both say how many data ranks a stage has",
            "drop data",
        )
    if plan.shard is not None:
        yield Problem(
            f"{asked} and shard={plan.shard}, but replicas of a stage take turns and share nothing",
            "drop shard",
        )
    if plan.order not in REPLICATED:
        yield Problem(
            f"{asked}, but schedule={plan.order} has the same ranks at every stage",
            f"use schedule=1f1b, or data={widths[0]} in place of replicas",
        )
    if plan.zero and not plan.asynchronous:
        yield Problem(
            f"{asked} with zero={plan.zero}, but replicas of a stage take turns and share nothing",
            "drop zero, or use data in place of replicas, which ZeRO shards over",
        )


def old_gradients_are_used_as_they_come(plan: Plan, facts: Facts) -> tuple[Problem, ...]:
    """Asynchronous schedules have none of what a flush, or one version of the weights, gives."""
    if not plan.asynchronous or plan.pipeline == 1:
        return ()
    return tuple(_unflushed(plan, facts, f"schedule={plan.schedule}"))


def _unflushed(plan: Plan, facts: Facts, asked: str) -> Iterator[Problem]:
    flush = "use a schedule that flushes, such as 1f1b"
    if plan.scales:
        yield Problem(
            f"{asked} has begun the next steps by the time that gradients of fp16 are found to "
            "overflow, and their step has to be left out",
            f"use precision=bf16, which needs no loss scaling, or {flush}",
        )
    if plan.precision == "bf16-pure":
        yield Problem(
            f"{asked} keeps older versions of the weights, which precision=bf16-pure does not "
            "round by itself",
            f"use precision=bf16, or {flush}",
        )
    if facts.clip_norm is not None:
        yield Problem(
            f"{asked} has no moment at which all stages' gradients of a minibatch are there, which "
            f"clip_norm={facts.clip_norm} takes the norm of",
            f"leave clip_norm out of the job, or {flush}",
        )
    if facts.slices is not None:
        yield Problem(
            f"{asked} has no moment at which all gradients of a minibatch are there, whose "
            f"variance adascale's scale={facts.slices} slices are for",
            f"leave adascale out of the job, or {flush}",
        )
    if facts.ema is not None:
        yield Problem(
            f"{asked} has no moment at which all stages' weights are of one step, which "
            f"ema={facts.ema} averages",
            f"leave ema out of the job, or {flush}",
        )
    if plan.zero:
        yield Problem(
            f"{asked} computes with several versions of the weights at once, but zero={plan.zero} "
            "keeps shards of one",
            f"drop zero, or {flush}",
        )
    if plan.schedule != "pipedream-2bw" and plan.microbatches > 1:
        yield Problem(
            f"{asked} updates the weights after every minibatch of batch_size samples and does not "
            f"divide it, but microbatches={plan.microbatches}",
            "drop microbatches, or use schedule=pipedream-2bw, which adds their gradients up",
        )
    if plan.schedule == "pipedream-2bw" and plan.microbatches < plan.pipeline:
        yield Problem(
            f"{asked} keeps two versions of the weights, which suffice only if a minibatch has a "
            f"micro-batch for each stage, but microbatches={plan.microbatches} and "
            f"pipeline={plan.pipeline}",
            f"use microbatches={plan.pipeline} or more, or schedule=pipedream",
        )


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
