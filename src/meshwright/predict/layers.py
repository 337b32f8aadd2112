"""Layers: a model as the partitioner sees it, a graph of layers with what each costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from meshwright.errors import UsageError

__all__ = ["Layer", "LayerGraph", "graph_of"]


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer, and what one mini-batch costs there.

    Attributes:
        name: unique within its graph.
        text: what it is, for people.
        forward: seconds.
        backward: seconds.
        activations: bytes that it makes for other layers.
        weights: bytes of its parameters.
    """

    name: str
    text: str = ""
    forward: float = 0.0
    backward: float = 0.0
    activations: float = 0.0
    weights: float = 0.0

    @property
    def seconds(self) -> float:
        """Forward and backward together."""
        return self.forward + self.backward


@dataclass(frozen=True, slots=True)
class LayerGraph:
    """Layers, and edges (number of the maker, number of the reader). `graph_of` checks one."""

    layers: tuple[Layer, ...]
    edges: tuple[tuple[int, int], ...]

    def readers(self) -> list[list[int]]:
        """Of each layer, those that read what it makes."""
        found: list[list[int]] = [[] for _ in self.layers]
        for maker, reader in self.edges:
            found[maker].append(reader)
        return found

    def makers(self) -> list[list[int]]:
        """Of each layer, those whose results it reads."""
        found: list[list[int]] = [[] for _ in self.layers]
        for maker, reader in self.edges:
            found[reader].append(maker)
        return found

    def order(self) -> list[int]:
        """The layers in an order in which they can run; those in a cycle, and after, are left out.

        Of layers that could be next, the one that comes first in the graph is.
        """
        missing = [len(makers) for makers in self.makers()]
        readers = self.readers()
        ready = [number for number, count in enumerate(missing) if not count]
        found: list[int] = []
        while ready:
            number = min(ready)
            ready.remove(number)
            found.append(number)
            for reader in readers[number]:
                missing[reader] -= 1
                if not missing[reader]:
                    ready.append(reader)
        return found

    def without(self, numbers: Sequence[int]) -> LayerGraph:
        """The graph without some layers and their edges."""
        gone = set(numbers)
        kept = [number for number in range(len(self.layers)) if number not in gone]
        new = {number: place for place, number in enumerate(kept)}
        edges = ((new[a], new[b]) for a, b in self.edges if a in new and b in new)
        return LayerGraph(tuple(self.layers[number] for number in kept), tuple(edges))


def graph_of(layers: Sequence[Layer], edges: Sequence[tuple[int, int]] | None = None) -> LayerGraph:
    """A graph of layers; a chain where no edges are given.

    Raises:
        UsageError: there is no layer, or edges go in a circle.
    """
    if not layers:
        raise UsageError("a model to be partitioned has no layers; it needs one at least")
    chain = [(number, number + 1) for number in range(len(layers) - 1)]
    graph = LayerGraph(tuple(layers), tuple(chain if edges is None else edges))
    left = set(range(len(layers))).difference(graph.order())
    if left:
        names = ", ".join(layers[number].name for number in sorted(left)[:4])
        raise UsageError(
            f"the edges between layers go in a circle through or before {names}; a layer may read "
            "only what layers before it make: take the edge that goes back out"
        )
    return graph
