"""AdaScale: how much further a step goes on a batch of several slices than on one of them.

Johnson et al. 2020, algorithm 1 and appendix B.3, per group of parameters as FairScale has it: of S
slices with gradients g_i, whose mean is g, the variance of one is estimated by

    v = sum |g_i|^2 / (S - 1) - |g|^2 S / (S - 1)      and the true |g|^2 by      m = |g|^2 - v / S

and with running averages of both the gain is (v + m) / (v / S + m), between 1 and S. It multiplies
the learning rate, and is how many steps on one slice this one was worth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from meshwright.errors import UserCodeError
from meshwright.job import AdaScale
from meshwright.program.slices import SQUARES

__all__ = ["Gains", "further", "gains_of", "restored", "saved"]

_LEAST = 1e-6
"""Of a variance: the paper's."""

Numbers = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Gains:
    """Where AdaScale is.

    Attributes:
        rule: how it goes.
        groups: the parameters of each group of the optimizer.
        ranks: that have slices of their own of a micro-batch.
        means: of each, the running sum of m.
        variances: likewise of v.
        weight: that both sums have; they are divided by it.
        iterations: how many steps on one slice all steps were worth.
    """

    rule: AdaScale
    groups: tuple[frozenset[str], ...]
    ranks: int
    means: Numbers
    variances: Numbers
    weight: float = 0.0
    iterations: float = 0.0

    def summed(
        self, totals: Mapping[str, Tensor], square: Callable[[frozenset[str]], Tensor]
    ) -> dict[str, Tensor]:
        """A rank's totals in which squares of slices are added up by group, and of their sum too.

        Args:
            totals: by name; those of squares are of each parameter.
            square: of the gradients of these parameters, this rank's share.
        """
        begin = SQUARES.removeprefix("total/")
        each = {n.removeprefix(begin): t for n, t in totals.items() if n.startswith(begin)}
        found = {name: total for name, total in totals.items() if not name.startswith(begin)}
        for number, names in enumerate(self.groups):
            mine = [each[name] for name in each if name in names]
            found[f"slices/{number}"] = sum(mine, torch.zeros((), dtype=torch.float64))
            found[f"whole/{number}"] = square(names)
        return found

    def judged(self, totals: Mapping[str, float], divisor: float) -> Gains:
        """After a step of these totals over all ranks, whose gradients are to be divided."""
        count, slices = range(len(self.groups)), self.rule.scale
        terms = [totals[f"slices/{k}"] * (slices / divisor) ** 2 for k in count]
        return self.after(terms, [totals[f"whole/{k}"] / divisor**2 for k in count])

    def after(self, terms: Sequence[float], totals: Sequence[float]) -> Gains:
        """After a step that is applied.

        Args:
            terms: of each group, the sum of |g_i|^2 over the slices.
            totals: of each group, |g|^2.
        """
        slices, keep = self.rule.scale, _smoothing(self.rule)
        means, variances = [], []
        for term, total in zip(terms, totals, strict=True):
            variance = (term - total * slices) / (slices - 1)
            means.append(max(total - variance / slices, 0.0))
            variances.append(max(variance, _LEAST))
        if not all(map(math.isfinite, (*terms, *totals))):  # of a step that is not to be looked at
            return replace(self, iterations=self.iterations + self.gain())
        found = replace(
            self,
            means=_averaged(self.means, means, keep),
            variances=_averaged(self.variances, variances, keep),
            weight=keep * self.weight + 1.0 - keep,
        )
        return replace(found, iterations=self.iterations + found.gain())

    @property
    def done(self) -> bool:
        """Whether the steps were worth as many as the job asks for."""
        return self.rule.iterations is not None and self.iterations >= self.rule.iterations

    def gain(self, group: int | None = None) -> float:
        """Of a group; of all parameters together by default."""
        if not self.weight:
            return 1.0
        part = slice(None) if group is None else slice(group, group + 1)
        mean, variance = sum(self.means[part]), sum(self.variances[part])
        return (variance + mean) / (variance / self.rule.scale + mean)

    @contextmanager
    def scaled(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Within, each group's learning rate is times its gain."""
        before = [group["lr"] for group in optimizer.param_groups]
        for number, group in enumerate(optimizer.param_groups):
            group["lr"] = group["lr"] * self.gain(number)
        try:
            yield
        finally:
            for group, rate in zip(optimizer.param_groups, before, strict=True):
                group["lr"] = rate


def _smoothing(rule: AdaScale) -> float:
    return max(1.0 - rule.scale / 1000, 0.0) if rule.smoothing is None else rule.smoothing


def _averaged(before: Numbers, now: Sequence[float], keep: float) -> Numbers:
    return tuple(keep * b + (1.0 - keep) * n for b, n in zip(before, now, strict=True))


def further(before: Gains | None, after: Gains | None) -> int:
    """By how many steps a schedule goes on."""
    if before is None or after is None:
        return 1
    return math.floor(after.iterations) - math.floor(before.iterations)


def gains_of(
    rule: AdaScale | None, groups: Sequence[tuple[Sequence[str], Any]], ranks: int
) -> Gains | None:
    """At the first step.

    Args:
        rule: of the job.
        groups: of the optimizer: names of parameters and settings.
        ranks: that have slices of their own of a micro-batch.

    Raises:
        UserCodeError: a group has no learning rate.
    """
    if rule is None:
        return None
    for number, (_, settings) in enumerate(groups):
        if "lr" not in settings:
            raise UserCodeError(
                f"adascale scales learning rates, but optimizer group {number} has no lr; leave "
                "adascale out of the job, or use another optimizer"
            )
    nothing = (0.0,) * len(groups)
    return Gains(rule, tuple(frozenset(names) for names, _ in groups), ranks, nothing, nothing)


def saved(gains: Gains | None) -> dict[str, Any] | None:
    """As a checkpoint keeps it."""
    if gains is None:
        return None
    return {
        "scale": gains.rule.scale,
        "means": list(gains.means),
        "variances": list(gains.variances),
        "weight": gains.weight,
        "iterations": gains.iterations,
    }


def restored(gains: Gains, kept: Mapping[str, Any] | None) -> Gains:
    """Where a checkpoint left it; the beginning, where it is of a run without.

    Slices that are k times as small vary k times as much.
    """
    if kept is None:
        return gains
    smaller = gains.rule.scale / kept["scale"]
    return replace(
        gains,
        means=tuple(map(float, kept["means"])),
        variances=tuple(float(number) * smaller for number in kept["variances"]),
        weight=float(kept["weight"]),
        iterations=float(kept["iterations"]),
    )
