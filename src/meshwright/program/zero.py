"""ZeRO as annotations: where weights, gradients and optimizer state of each parameter lie.

Rajbhandari et al. 2020, section 5: stage 1 shards the optimizer state over the data axis, stage 2
the gradients too, stage 3 the weights too. Gradients that are not sharded are accumulated as
partial sums and reduced once a step.

    zero   weights      gradients     optimizer
    0      replicated   partial       replicated
    1      replicated   partial       sharded
    2      replicated   sharded       sharded
    3      sharded      sharded       sharded
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from meshwright.plan.mesh import Axis
from meshwright.program.layout import REPLICATED, Layout, Partial, Shard
from meshwright.program.program import Value

__all__ = ["StateLayouts", "WHOLE_BELOW", "shard_dim", "zero_layouts"]

WHOLE_BELOW = 1024
"""Parameters of fewer bytes stay whole: a collective costs more than they weigh."""


@dataclass(frozen=True, slots=True)
class StateLayouts:
    """Layouts of one parameter's state."""

    weights: Layout
    gradients: Layout
    optimizer: Layout


def shard_dim(shape: tuple[int, ...], parts: int) -> int | None:
    """The dim to split in `parts`: least padding, then the first; None if none is long enough."""

    def padding(dim: int) -> int:
        """Elements that a split into equal parts would add."""
        size = shape[dim]
        rest = 1
        for other, length in enumerate(shape):
            rest *= length if other != dim else 1
        return (-size % parts) * rest

    dims = [dim for dim, size in enumerate(shape) if size >= parts]
    return min(dims, key=padding) if dims else None


def zero_layouts(
    zero: int, parameters: Mapping[str, Value], axis: Axis, still: frozenset[str] = frozenset()
) -> dict[str, StateLayouts]:
    """The layouts of every parameter's state under ZeRO stage `zero` over `axis`.

    Parameters that stay `still` (frozen, or not the optimizer's) have no optimizer state and no
    update that would move them; stage 3 shards them all the same.
    """
    found = {}
    for name, value in parameters.items():
        dim = shard_dim(value.shape, axis.size) if value.bytes >= WHOLE_BELOW else None
        if axis.size == 1:
            found[name] = StateLayouts(REPLICATED, REPLICATED, REPLICATED)
            continue
        partial = Layout(((axis.name, Partial()),))
        split = REPLICATED if dim is None else Layout(((axis.name, Shard(dim)),))
        shards_state = zero >= (3 if name in still else 1)
        # Gradients of what stays whole are reduced once a step at any stage.
        late = zero < 2 or dim is None or not shards_state
        found[name] = StateLayouts(
            weights=split if zero == 3 else REPLICATED,
            gradients=partial if late else split,
            optimizer=split if shards_state else REPLICATED,
        )
    return found
