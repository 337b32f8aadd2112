"""ZeRO as annotations: where weights, gradients and optimizer state of each parameter lie.

Rajbhandari et al. 2020, section 5: stage 1 shards the optimizer state over the data axis, stage 2
the gradients too, stage 3 the weights too. Gradients that are not sharded are accumulated as
partial sums and reduced once a step; a plan may ask for either at any stage (`reduce`): once a
step moves the fewest bytes, each micro-batch's at once holds the fewest.

    zero   weights      gradients     optimizer
    0      replicated   partial       replicated
    1      replicated   partial       sharded
    2      replicated   sharded       sharded
    3      sharded      sharded       sharded
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from meshwright.plan.mesh import SAMPLE_AXES, Axis
from meshwright.program.layout import REPLICATED, Fused, Layout, Partial, Shard
from meshwright.program.program import Value

__all__ = [
    "WHOLE_BELOW",
    "StateLayouts",
    "gathered_once",
    "shard_dim",
    "slot_layout",
    "zero_layouts",
]

_SUMMED = (*SAMPLE_AXES, "context")
"""Axes that split samples or their tokens, so that every gradient is a sum over them."""

WHOLE_BELOW = 1024
"""Parameters of fewer bytes stay whole: a collective costs more than they weigh."""


@dataclass(frozen=True, slots=True)
class StateLayouts:
    """Layouts of one parameter's state.

    Attributes:
        weights: at rest.
        gradients: while they accumulate.
        optimizer: of its state, and of the gradients that it takes.
        work: of weights as ops read them; what `weights` splits further is gathered for each use.
    """

    weights: Layout
    gradients: Layout
    optimizer: Layout
    work: Layout = REPLICATED


def shard_dim(shape: tuple[int, ...], parts: int, work: Layout = REPLICATED) -> int | None:
    """The dim to split in `parts`: least padding, then the first; None if none is long enough.

    Dims that `work` splits over other axes are left alone.
    """
    taken = {p.dim for _, p in work.placements if isinstance(p, Shard | Fused)}

    def padding(dim: int) -> int:
        """Elements that a split into equal parts would add."""
        rest = math.prod(size for other, size in enumerate(shape) if other != dim)
        return (-shape[dim] % parts) * rest

    dims = [dim for dim, size in enumerate(shape) if size >= parts and dim not in taken]
    return min(dims, key=padding) if dims else None


def zero_layouts(
    zero: int,
    parameters: Mapping[str, Value],
    axes: Sequence[Axis],
    still: frozenset[str] = frozenset(),
    work: Mapping[str, Layout] = MappingProxyType({}),
    reduce: str | None = None,
) -> dict[str, StateLayouts]:
    """The layouts of every parameter's state under ZeRO stage `zero`.

    It shards over the axis `data`, or over `shard` where there is one; what `expert` does not split
    already, over that too, since its ranks have samples of their own.

    Args:
        zero: 0 to 3.
        parameters: by name.
        axes: of the mesh.
        still: parameters that are frozen, or not the optimizer's: they have no optimizer state and
            no update that would move them; stage 3 shards them all the same.
        work: how the other axes split parameters; those not named are whole.
        reduce: gradients once a `step`, or of each `microbatch`; None leaves it to the stage.
    """
    found = {}
    for name, value in parameters.items():
        base = work.get(name, REPLICATED)
        shards = _shards(value, axes, base) if value.bytes >= WHOLE_BELOW else {}
        owed = {a.name: Partial() for a in axes if a.name in _SUMMED and a.size > 1}
        partial = Layout.of(axes, {**owed, **dict(base.placements)})
        split = Layout.of(axes, {**dict(base.placements), **shards})
        shards_state = zero >= (3 if name in still else 1)
        optimizer = split if shards_state else base
        # Left to the stage, gradients of what stays whole are reduced once a step.
        late = zero < 2 or not shards or not shards_state
        gradients = partial if late else Layout.of(axes, {**dict(partial.placements), **shards})
        given = {None: gradients, "step": partial, "microbatch": optimizer}
        weights = split if zero == 3 else base
        found[name] = StateLayouts(weights, given[reduce], optimizer, base)
    return found


def slot_layout(slot: Value, parameter: Value, state: StateLayouts, axes: Sequence[Axis]) -> Layout:
    """How a tensor of the optimizer's state lies.

    One of the parameter's shape lies as the parameter's state does. Another (a factor of a matrix)
    is whole on every rank, but where ZeRO shards the state it is sharded as a parameter would be.
    """
    if slot.shape == parameter.shape and slot.shape:
        return state.optimizer
    work = dict(state.work.placements)
    by_zero = any(work.get(name) != place for name, place in state.optimizer.placements)
    if not by_zero or slot.bytes < WHOLE_BELOW:
        return REPLICATED
    return Layout.of(axes, _shards(slot, axes, REPLICATED))


def gathered_once(state: StateLayouts) -> StateLayouts:
    """The layouts in a step whose weights are gathered once; fused ones stay as they rest."""
    if any(isinstance(place, Fused) for _, place in state.weights.placements):
        return state
    return replace(state, weights=state.work)


def _shards(value: Value, axes: Sequence[Axis], work: Layout) -> dict[str, Shard]:
    """Over which axes a parameter is sharded, and how: over as many as a dim is long enough for."""
    sizes = {axis.name: axis.size for axis in axes}
    over = ["shard" if "shard" in sizes else "data", "expert"]
    over = [name for name in over if sizes.get(name, 1) > 1 and work.on(name) is None]
    while over:
        dim = shard_dim(value.shape, math.prod(sizes[name] for name in over), work)
        if dim is not None:
            return dict.fromkeys(over, Shard(dim))
        over.pop()
    return {}
