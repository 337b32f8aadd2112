"""What to try next: small rules over the run's own numbers, each with its reason and command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Final

from meshwright.view.commands import changed_plan, train_command, verify_command
from meshwright.view.folder import Folder
from meshwright.view.layouts import shards
from meshwright.view.measures import Measures
from meshwright.view.units import bytes_text, percent_text, seconds_text, value_text

__all__ = ["Advice", "advise"]

_MOST: Final = 4


@dataclass(frozen=True, slots=True)
class Advice:
    """Something to try: what, why (with the run's numbers), and the command if one does it."""

    title: str
    why: str
    command: str = ""


Rule = Callable[[Folder, Measures], Advice | None]


def advise(folder: Folder, measures: Measures) -> tuple[Advice, ...]:
    """At most four pieces of advice, the most pressing first."""
    found = (rule(folder, measures) for rule in _RULES)
    return tuple(advice for advice in found if advice)[:_MOST]


def _failed_law(folder: Folder, _: Measures) -> Advice | None:
    result = folder.verification
    if result is None or result.passed:
        return None
    worst = result.worst_tensor or "the worst tensor"
    return Advice(
        f"Find out why {worst} differs",
        "This plan's numbers are not those of one device. If the model sums in an order of its "
        "own, compare in float64; if the difference stays, it is a bug, ours or a custom op's.",
        verify_command(folder.setup),
    )


def _not_finite(_: Folder, measures: Measures) -> Advice | None:
    if not measures.not_finite:
        return None
    steps = f"{measures.not_finite:,} step{'s' if measures.not_finite > 1 else ''}"
    return Advice(
        "Stop the loss from overflowing",
        f"The loss of {steps} was not a finite number. Lower the learning rate, warm it up, or "
        "set clip_norm in the Job.",
    )


def _unverified(folder: Folder, _: Measures) -> Advice | None:
    if folder.verification is not None:
        return None
    return Advice(
        "Prove that the numbers are those of one device",
        "A few steps under this plan and on one device, compared tensor by tensor.",
        verify_command(folder.setup),
    )


def _overfitted(_: Folder, measures: Measures) -> Advice | None:
    best, last = measures.best, measures.last
    if best is None or last is None or best.loss is None or last.loss is None:
        return None
    if best.step == last.step or last.loss < 1.02 * best.loss:
        return None
    return Advice(
        f"Stop at step {best.step:,}, or regularise",
        f"The held-out loss was lowest there, {value_text(best.loss)}, and has risen to "
        f"{value_text(last.loss)} since.",
    )


def _slow_data(_: Folder, measures: Measures) -> Advice | None:
    time = measures.time
    if time is None or not time.total:
        return None
    waiting = dict(time.parts)["data"]
    if waiting < 0.2 * time.total:
        return None
    share = percent_text(waiting / time.total)
    return Advice(
        "Load data in worker processes",
        f"A step waits {seconds_text(waiting)} for its samples, {share} of its time. "
        "Return a DataLoader with num_workers from the Job's data.",
    )


def _gather_less(folder: Folder, measures: Measures) -> Advice | None:
    setup, share = folder.setup, _communication(measures)
    whole = sum(parameter.bytes for parameter in setup.parameters)
    kept = sum(p.bytes // max(1, shards(p.weights, setup.axes)) for p in setup.parameters)
    plan = changed_plan(setup, zero=2)
    if share < 0.2 or kept > 0.6 * whole or plan is None:
        return None
    return Advice(
        "Keep the weights whole: zero2",
        f"Communication is {percent_text(share)} of a step, and gathering sharded weights is most "
        f"of it. Whole weights take {bytes_text(whole - kept)} more on each rank.",
        train_command(setup, plan),
    )


def _larger_batch(folder: Folder, measures: Measures) -> Advice | None:
    share = _communication(measures)
    if share < 0.35:
        return None
    return Advice(
        "Give each rank more to compute",
        f"Communication is {percent_text(share)} of a step. What it moves does not grow with the "
        f"batch: a larger batch_size than {folder.setup.batch_size:,}, or fewer ranks, spends a "
        "smaller share on it.",
    )


def _shard_optimizer(folder: Folder, measures: Measures) -> Advice | None:
    setup = folder.setup
    ranks = dict(setup.axes).get("data", 1)
    state = max((dict(entry.parts).get("optimizer", 0) for entry in setup.memory), default=0)
    plan = changed_plan(setup, zero=1)
    sharded = any(shards(p.optimizer, setup.axes) > 1 for p in setup.parameters)
    if ranks < 2 or sharded or plan is None or state < 0.1 * (measures.memory or 1):
        return None
    return Advice(
        "Shard the optimizer's state: zero1",
        f"Each rank keeps all {bytes_text(state)} of it; sharded over data it would keep "
        f"{bytes_text(state / ranks)}, and a step moves no more bytes than now.",
        train_command(setup, plan),
    )


def _split_batch(folder: Folder, measures: Measures) -> Advice | None:
    setup, memory = folder.setup, measures.memory or 0
    saved = max(
        (dict(entry.parts).get("saved activations", 0) for entry in setup.memory), default=0
    )
    twice = 2 * setup.microbatches
    plan = changed_plan(setup, microbatches=twice)
    if saved < 0.5 * memory or not memory or plan is None:
        return None
    if setup.batch_size < twice * prod(size for _, size in setup.axes):
        return None
    return Advice(
        f"Halve the saved activations: microbatches={twice}",
        f"They are {percent_text(saved / memory)} of a rank's memory, {bytes_text(saved)}. The "
        "batch and the numbers stay the same; a model with batch norm keeps its micro-batch.",
        train_command(setup, plan),
    )


def _no_evaluation(folder: Folder, _: Measures) -> Advice | None:
    if folder.history.evaluations or not folder.history.steps:
        return None
    return Advice(
        "Measure on data the model has not seen",
        "Give the Job an evaluation, a function that returns held-out data, and train with "
        "evaluate_every.",
    )


def _communication(measures: Measures) -> float:
    time = measures.time
    return dict(time.parts)["communication"] / time.total if time and time.total else 0.0


_RULES: Final[tuple[Rule, ...]] = (
    _failed_law,
    _not_finite,
    _unverified,
    _overfitted,
    _slow_data,
    _gather_less,
    _larger_batch,
    _shard_optimizer,
    _split_batch,
    _no_evaluation,
)
