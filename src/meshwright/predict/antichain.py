"""Antichains: the places at which a graph of layers can be cut.

A *state* is a set of layers that holds, with each layer, all those before it: what a prefix is in a
chain. Between two states, one within the other, lies what could be a stage. A state is told by its
last layers, of which none comes before another: an antichain.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from meshwright.errors import PlanError
from meshwright.predict.layers import LayerGraph

__all__ = ["State", "antichains", "members", "prefixes", "reached"]


@dataclass(frozen=True, slots=True)
class State:
    """A set of layers closed under what comes before, and what they sum to.

    Attributes:
        mask: the layers' numbers, as bits.
        seconds: forward and backward.
        weights: bytes of parameters.
        activations: bytes that its layers make.
        output: bytes that cross to the layers outside.
    """

    mask: int
    seconds: float
    weights: float
    activations: float
    output: float


def antichains(graph: LayerGraph, most: int = 4000) -> tuple[State, ...]:
    """The states of a graph, from none of the layers to all, each after those within it.

    They grow from the first source along the edges; another source joins with the first layer that
    needs it, or when nothing else is left.

    Raises:
        PlanError: there are more than `most`, which wide graphs have soon.
    """
    whole = (1 << len(graph.layers)) - 1
    before, after = _before(graph), _after(graph)
    order = graph.order()
    found, queue = {0}, [0]
    for mask in queue:
        ways = reached(mask, after) or _first_outside(mask, whole, order)
        for layer in members(ways):
            grown = mask | before[layer]
            if grown not in found:
                found.add(grown)
                queue.append(grown)
        if len(found) > most:
            raise PlanError(
                f"a model of {len(graph.layers)} layers can be cut in more than {most} ways, for "
                "its branches; partition the prefixes of its order instead, or join the layers "
                "within a branch"
            )
    return ordered(graph, found)


def prefixes(graph: LayerGraph) -> tuple[State, ...]:
    """The states that are prefixes of the order of layers, which is always legal."""
    masks = [0]
    for layer in graph.order():
        masks.append(masks[-1] | 1 << layer)
    return ordered(graph, masks)


def members(mask: int) -> Iterator[int]:
    """The numbers of the bits that are set, lowest first."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def reached(mask: int, after: Sequence[int]) -> int:
    """The layers outside that read what those inside make."""
    found = 0
    for layer in members(mask):
        found |= after[layer]
    return found & ~mask


def ordered(graph: LayerGraph, masks: Sequence[int] | set[int]) -> tuple[State, ...]:
    """States of sets of layers, each after those within it."""
    after = _after(graph)
    made = (_state(graph, mask, after) for mask in masks)
    return tuple(sorted(made, key=lambda state: (state.seconds, state.mask.bit_count())))


def _state(graph: LayerGraph, mask: int, after: Sequence[int]) -> State:
    layers = [graph.layers[number] for number in members(mask)]
    crossing = [graph.layers[n].activations for n in members(mask) if after[n] & ~mask]
    # Correctly rounded sums: a state never costs less than one within it.
    return State(
        mask,
        math.fsum(part for layer in layers for part in (layer.forward, layer.backward)),
        math.fsum(layer.weights for layer in layers),
        math.fsum(layer.activations for layer in layers),
        math.fsum(crossing),
    )


def _before(graph: LayerGraph) -> list[int]:
    """Of each layer, itself and all before it."""
    found = [1 << number for number in range(len(graph.layers))]
    makers = graph.makers()
    for number in graph.order():
        for maker in makers[number]:
            found[number] |= found[maker]
    return found


def _after(graph: LayerGraph) -> list[int]:
    """Of each layer, those that read what it makes."""
    found = [0] * len(graph.layers)
    for maker, reader in graph.edges:
        found[maker] |= 1 << reader
    return found


def _first_outside(mask: int, whole: int, order: Sequence[int]) -> int:
    """The first layer that is not inside; none where all are."""
    if mask == whole:
        return 0
    return 1 << next(layer for layer in order if not mask >> layer & 1)
