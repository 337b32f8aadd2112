"""The reference's own rounding: how far it is from itself in another order of summation.

In float32 that is what first-step gradients are held to. In float64 it explains one thing only:
a weight whose true gradient is zero (a key bias, a bias before a norm), whose rounding Adam divides
by its eps. Such a tensor, and no other, may be over the law by what it differs by in the reference.

In 16 bits a rank's term of a gradient is rounded before the sum, to half a unit in the last place
of its largest element. Docs: decisions/0010.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from meshwright.compile.region import Precision
from meshwright.run.equality.measure import KINDS, LAW, Report, Worst, compare, order
from meshwright.run.equality.reference import Reference, Snapshot

__all__ = [
    "allow_zeros",
    "float32_limits",
    "own_rounding",
    "same_sums",
    "settle_short",
    "short_report",
]

TIMES = 4
LARGEST = 1e-6
"""More rounding than this would measure nothing: it explains no error."""


ULP = {"bf16": 2.0**-7, "fp16": 2.0**-10}
"""The unit in the last place of the largest element, by what something computes in.

It is the limit of a gradient, and a quarter of it, the rounding error, that of the loss. A gradient
that is zero but for rounding (a key bias) is compared at this part of all others.
"""
SAME = 1e-8


def _whole(_: str, tensor: Tensor) -> Tensor:
    return tensor


def _kind(_: str) -> str:
    return "gradients"


def float32_limits(first: Snapshot, flipped: Snapshot) -> dict[str, float]:
    """Limits in float32: the loss to 1e-5, first-step gradients to the reference's own rounding."""
    own = compare(flipped.gradients, first.gradients, _whole, _kind)
    return {"loss": 1e-5, "gradients": max(1e-5, TIMES * max(own.values(), default=0.0))}


def own_rounding(
    first: Reference, flipped: Reference, steps: int, names: Iterable[str]
) -> dict[str, float]:
    """What each of these weights may differ by in float64.

    Args:
        first: the reference.
        flipped: the same with samples in the opposite order.
        steps: to run.
        names: of weights over the law.
    """
    own = dict.fromkeys(names, 0.0)
    for step in range(steps):
        found = compare(
            flipped.after(step).weights,
            first.after(step).weights,
            _whole,
            lambda name: name.partition("/")[0],
        )
        for name, error in found.items():
            bare = name.partition("/")[2]
            if bare in own:
                own[bare] = max(own[bare], error)
    return {name: TIMES * error for name, error in own.items() if error <= LARGEST}


def short_report(precision: Precision) -> Report:
    """A report of what the law in 16 bits is about; the loss scale is to be the reference's own."""
    used = {name.partition("-")[0] for name in (precision.base, *dict(precision.modules).values())}
    ulp = max(ULP[name] for name in used if name in ULP)
    limits = {"loss": ulp / 4, "gradients": ulp}
    limits |= {"loss scale": LAW} if precision.scales else {}
    worst = dict.fromkeys((*KINDS, *limits), Worst())
    return Report(worst, limits, first_only=True, floor=ulp, explains="gradients")


def settle_short(report: Report, first: Reference, others: Sequence[Reference], steps: int) -> None:
    """Hold each tensor to the larger of the limit and what other orders of summation cost it.

    The report then shows the tensor that is furthest over, or nearest to, what it is allowed.

    Args:
        report: of a run in 16 bits, over all ranks.
        first: the reference.
        others: the same with its sums in other orders.
        steps: that were run.
    """
    apart, own = 0.0, dict.fromkeys(report.over, 0.0)
    for step in range(steps):
        here = first.after(step)
        for other in (reference.after(step) for reference in others):
            apart = max(apart, abs(other.loss - here.loss) / max(abs(here.loss), 1e-300))
            if step == report.first:
                found = compare(other.gradients, here.gradients, _whole, _kind, report.floor)
                own = {name: max(error, found.get(name, 0.0)) for name, error in own.items()}
    report.limits["loss"] = max(report.limits["loss"], TIMES * apart)
    report.rounding = {name: TIMES * error for name, error in own.items()}
    _show_worst(report)


def allow_zeros(report: Report, exact: Mapping[str, Tensor]) -> None:
    """A gradient that is zero in float64 (a bias before a norm) is the rounding of what cancels.

    It may be as far off as the report's `floor` of all others.

    Args:
        report: of a run in 16 bits, settled.
        exact: the float64 gradients of the first step.
    """
    squares = sum(float(tensor.abs().square().sum()) for tensor in exact.values())
    typical = math.sqrt(squares / max(1, sum(tensor.numel() for tensor in exact.values())))
    for name in report.over:
        if name in exact and float(exact[name].abs().max()) <= SAME * typical:
            report.rounding[name] = max(1.0, report.rounding[name])
    _show_worst(report)


def _show_worst(report: Report) -> None:
    """Put the tensor that is furthest over, or nearest to, what it is allowed into the report."""
    if report.over:
        limit = report.floor
        allowed = {name: max(limit, own) for name, own in report.rounding.items()}
        name = max(allowed, key=lambda name: order(report.over[name] / allowed[name]))
        report.worst["gradients"] = Worst(report.over[name], name, 0)
        report.limits["gradients"] = allowed[name]


def same_sums(one: Snapshot, other: Snapshot) -> bool:
    """Whether two float64 steps differ in the order of their sums only."""
    found = compare(one.gradients, other.gradients, _whole, _kind)
    return max(found.values(), default=0.0) <= SAME
