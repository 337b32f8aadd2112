"""How far a plan's tensors are from one device's, and what the law allows.

Error of a tensor = max|a-b| / max(max|b|, 1e-3 r), r the root mean square over all elements of its
kind (gradients, weights, each optimizer slot): biases before a norm have true gradient zero, and
plain relative error would compare noise with noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["KINDS", "LAW", "Report", "Worst", "compare", "order", "wide"]

KINDS = ("loss", "gradients", "weights", "optimizer")
LAW = 1e-10
"""Largest relative error in float64."""

FLOOR = 1e-3


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
    """Worst errors by kind over all ranks and steps, and the limits that they must keep.

    Attributes:
        worst: by kind.
        limits: by kind.
        first_only: gradients of later steps, which follow other weights, do not count.
        first: the first step that was applied, where one was.
        floor: of the scale of a tensor's error, in root mean squares of its kind.
        explains: the kind whose tensors the reference's own rounding may explain.
        over: tensors of that kind over their limit, and their error.
        rounding: what the reference itself allows these, by name; see `rounding.py`.
    """

    worst: dict[str, Worst] = field(default_factory=lambda: dict.fromkeys(KINDS, Worst()))
    limits: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, LAW))
    first_only: bool = False
    first: int | None = None
    floor: float = FLOOR
    explains: str = "weights"
    over: dict[str, float] = field(default_factory=dict)
    rounding: dict[str, float] = field(default_factory=dict)

    @property
    def failing(self) -> tuple[str, ...]:
        """The kinds that are over their limit."""
        return tuple(k for k, limit in self.limits.items() if not self.worst[k].error <= limit)

    @property
    def passed(self) -> bool:
        """Whether every kind is within its limit, but for tensors that are rounding."""
        return not self.failing or (self.failing == (self.explains,) and not self.unexplained)

    @property
    def unexplained(self) -> tuple[str, ...]:
        """Tensors over the law by more than the reference's own rounding of that tensor."""
        return tuple(n for n, error in self.over.items() if not error <= self.rounding.get(n, 0.0))

    @property
    def worst_tensor(self) -> Worst:
        """The tensor furthest over (or nearest to) its limit."""
        kind = max(self.limits, key=lambda k: order(self.worst[k].error / self.limits[k]))
        return self.worst[kind]

    def add(self, kind: str, error: float, tensor: str, step: int) -> None:
        """Take one tensor's error in."""
        if kind == self.explains and not error <= self.limits.get(kind, LAW):
            self.over[tensor] = max(error, self.over.get(tensor, 0.0))
        self.worst[kind] = self.worst[kind].worse(Worst(error, tensor, step))


def order(error: float) -> float:
    """Errors by size, NaN the largest."""
    return math.inf if math.isnan(error) else error


def wide(tensor: Tensor) -> Tensor:
    """In double precision."""
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def scales(tensors: Mapping[str, Tensor], kind_of: Callable[[str], str]) -> dict[str, float]:
    """Per kind, the root mean square over all its elements."""
    squares: dict[str, float] = {}
    counts: dict[str, int] = {}
    for name, tensor in tensors.items():
        kind = kind_of(name)
        squares[kind] = squares.get(kind, 0.0) + float(wide(tensor).abs().square().sum())
        counts[kind] = counts.get(kind, 0) + tensor.numel()
    return {kind: math.sqrt(squares[kind] / max(1, counts[kind])) for kind in squares}


def compare(
    parts: Mapping[str, Tensor],
    whole: Mapping[str, Tensor],
    part_of: Callable[[str, Tensor], Tensor],
    kind_of: Callable[[str], str],
    floor: float = FLOOR,
    held: Callable[[str], bool] = lambda _: True,
) -> dict[str, float]:
    """Error of each of a rank's parts against what `part_of` takes of the whole tensors.

    A name that only one side has is an infinite error, unless the rank's stage does not hold it.
    """
    scale = scales(whole, kind_of)
    mine = {name for name in whole if held(name)}
    found = dict.fromkeys(set(parts) ^ mine, math.inf)
    for name in set(parts) & mine:
        reference = wide(whole[name])
        part = part_of(name, reference)
        if part.shape != parts[name].shape:
            found[name] = math.inf
            continue
        if not part.numel():
            continue
        size = max(float(reference.abs().max()), floor * scale[kind_of(name)])
        difference = float((wide(parts[name]) - part).abs().max())
        found[name] = difference / size if size else difference
    return found
