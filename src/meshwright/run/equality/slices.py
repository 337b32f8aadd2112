"""AdaScale eagerly: a user's loop over a batch's slices, each with a backward of its own.

Johnson et al. 2020, appendix B.3, written as FairScale's wrapper behaves: its averages are of what
was seen so far, weighted, and the optimizer's learning rates are multiplied for the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from meshwright.job import AdaScale

__all__ = ["Sliced", "sliced_of"]


@dataclass(slots=True)
class Sliced:
    """AdaScale around an optimizer over whole tensors.

    Attributes:
        rule: of the job.
        optimizer: whose learning rates it scales.
        sums: by group, squared norms of the slices of this step, as their backward left them.
        seen: by group, ("|g|^2", "variance") of each step that was applied, oldest first.
        iterations: the sum of the gains.
    """

    rule: AdaScale
    optimizer: torch.optim.Optimizer
    sums: list[float] = field(default_factory=list)
    seen: list[list[tuple[float, float]]] = field(default_factory=list)
    iterations: float = 0.0

    def take(self, gradients: Mapping[int, Tensor]) -> None:
        """A slice's gradients, by id of the parameter."""
        found = [_square(gradients.get(id(p)) for p in g["params"]) for g in self._groups]
        self.sums = [a + b for a, b in zip(self.sums or [0.0] * len(found), found, strict=True)]

    def judge(self, parameters: Sequence[nn.Parameter], factor: float) -> None:
        """Look at the step's gradients, which are means; the slices' are to be times `factor`."""
        mine, count = {id(p): p.grad for p in parameters}, self.rule.scale
        self.seen = self.seen or [[] for _ in self._groups]
        for seen, group, term in zip(self.seen, self._groups, self.sums, strict=True):
            whole = _square(mine.get(id(p)) for p in group["params"])
            each = term * (count * factor) ** 2 / count  # the mean of |g_i|^2
            variance = (each - whole) * count / (count - 1)
            seen.append((max(whole - variance / count, 0.0), max(variance, 1e-6)))
        self.sums = []
        self.iterations += self.gain(self.seen)

    def drop(self) -> None:
        """Of a step that is left out nothing stays."""
        self.sums = []

    def gain(self, seen: Sequence[Sequence[tuple[float, float]]] | None = None) -> float:
        """Of all parameters, or of the groups that are given."""
        if not (seen or self.seen):
            return 1.0  # no step was applied
        means = [self._mean([m for m, _ in group]) for group in seen or self.seen]
        variances = [self._mean([v for _, v in group]) for group in seen or self.seen]
        m, v = sum(means), sum(variances)
        return (v + m) / (v / self.rule.scale + m)

    def _mean(self, numbers: Sequence[float]) -> float:
        keep = self.rule.smoothing
        if keep is None:
            keep = max(1 - self.rule.scale / 1000, 0)
        weights = [keep**age for age in reversed(range(len(numbers)))]
        return sum(w * n for w, n in zip(weights, numbers, strict=True)) / sum(weights)

    def step(self, step: Any) -> None:
        """Step the optimizer at scaled learning rates."""
        before = [group["lr"] for group in self._groups]
        for group, seen in zip(self._groups, self.seen, strict=True):
            group["lr"] *= self.gain([seen])
        step()
        for group, rate in zip(self._groups, before, strict=True):
            group["lr"] = rate

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups


def sliced_of(rule: AdaScale | None, optimizer: torch.optim.Optimizer) -> Sliced | None:
    """At the first step."""
    return None if rule is None else Sliced(rule, optimizer)


def _square(gradients: Any) -> float:
    return sum(float(g.double().square().sum()) for g in gradients if g is not None)
