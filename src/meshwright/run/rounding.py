"""The reference's own rounding: how far it is from itself in another order of summation.

In float32 that is what first-step gradients are held to. In float64 it explains one thing only:
a weight whose true gradient is zero (a key bias, a bias before a norm), whose rounding Adam divides
by its eps. Such a tensor, and no other, may be over the law by what it differs by in the reference.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from meshwright.run.measure import compare
from meshwright.run.reference import Reference, Snapshot

__all__ = ["float32_limits", "own_rounding"]

TIMES = 4
LARGEST = 1e-6
"""More rounding than this would measure nothing: it explains no error."""


def _whole(_: str, tensor: Tensor) -> tuple[tuple[int, int], ...]:
    return tuple((0, size) for size in tensor.shape)


def float32_limits(first: Snapshot, flipped: Snapshot) -> dict[str, float]:
    """Limits in float32: the loss to 1e-5, first-step gradients to the reference's own rounding."""
    own = compare(flipped.gradients, first.gradients, _whole, lambda _: "gradients")
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
