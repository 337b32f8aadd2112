"""Random models and machines, and the best partition of them by trying every one."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache
from itertools import combinations, pairwise

from meshwright.predict.layers import Layer, graph_of
from meshwright.predict.machine import Level, Memory


def layer(name, rng):
    forward, backward = rng.choice((0, 1, 2, 5)) / 4, rng.choice((0, 1, 3, 8)) / 4
    return Layer(name, "", forward, backward, rng.randint(0, 8), rng.choice((0, 1, 6, 40)))


def chain(rng, count):
    return graph_of([layer(f"l{number}", rng) for number in range(count)])


def branching(rng, count):
    """A graph of one source from which every layer can be reached."""
    edges = set()
    for reader in range(1, count):
        edges.add((rng.randrange(reader), reader))
        edges.update((rng.randrange(reader), reader) for _ in range(rng.choice((0, 0, 1))))
    return graph_of([layer(f"l{number}", rng) for number in range(count)], sorted(edges))


def machine(rng, depth, most):
    return tuple(Level(rng.randint(1, most), rng.choice((1, 4, 20))) for _ in range(depth))


def bound(rng, graph):
    """A memory that often holds some partitions but not all."""
    whole = sum(one.weights + one.activations for one in graph.layers)
    capacity = whole * rng.choice((0.4, 0.8, 1.2, 2.5))
    versions, flying = rng.choice((None, 1, 2)), rng.choice((None, None, 3))
    return Memory(capacity, versions, rng.choice((0, 0.5)), flying)


def closed(graph):
    """All sets of layers that hold, with each, what it reads."""
    count = len(graph.layers)
    subsets = (frozenset(s) for k in range(count + 1) for s in combinations(range(count), k))
    return [s for s in subsets if all(maker in s for maker, reader in graph.edges if reader in s)]


def compositions(total, parts):
    """Every way to give `total` units to `parts` stages, one or more each."""
    for cuts in combinations(range(1, total), parts - 1):
        ends = (0, *cuts, total)
        yield tuple(b - a for a, b in pairwise(ends))


def chains(begin, end, states, stages):
    """Every way to go from one state to another by `stages` steps."""
    if stages == 1:
        yield (begin, end)
        return
    for middle in states:
        if begin < middle < end:
            yield from ((begin, *rest) for rest in chains(middle, end, states, stages - 1))


class Tried:
    """The least seconds over all partitions, by the paper's costs and the bound's own words."""

    def __init__(self, graph, levels, *, straight=False, memory=None):
        self.graph, self.levels, self.straight, self.memory = graph, levels, straight, memory
        self.states = closed(graph)
        self.unit = cache(self._unit)

    @property
    def seconds(self):
        return self.unit(len(self.levels), frozenset(), frozenset(range(len(self.graph.layers))), 0)

    def summed(self, layers, name):
        return math.fsum(getattr(self.graph.layers[number], name) for number in layers)

    def crossing(self, state):
        makers = {m for m, reader in self.graph.edges if m in state and reader not in state}
        return self.summed(makers, "activations")

    def leaf(self, layers, after):
        """One worker, with `after` workers behind it for each of its stage's."""
        if self.memory is not None:
            flying = math.ceil(1 + after)
            flying = min(flying, self.memory.microbatches or flying)
            versions = min(flying, self.memory.versions or flying)
            weights, kept = self.summed(layers, "weights"), self.summed(layers, "activations")
            if versions * weights + self.memory.beside * weights + flying * kept > (
                self.memory.capacity
            ):
                return math.inf
        return self.summed(layers, "seconds")

    def _unit(self, depth, begin, end, after):
        """One unit of level `depth` - 1 machines; every chain of stages on every share of units."""
        if not depth:
            return self.leaf(end - begin, after)
        level, best = self.levels[depth - 1], math.inf
        for stages in range(1, level.units + 1):
            shares = list(compositions(level.units, stages))
            if self.straight:
                shares = [share for share in shares if max(share) == 1]
            for path in chains(begin, end, self.states, stages) if shares else ():
                for share in shares:
                    best = min(best, self.priced(depth, path, share, after))
        return best

    def priced(self, depth, path, share, after):
        level = self.levels[depth - 1]
        size = math.prod(inner.units for inner in self.levels[: depth - 1])
        worst = max((2 * self.crossing(cut) / level.bandwidth for cut in path[1:-1]), default=0)
        behind = sum(share)
        for begin, end, units in zip(path, path[1:], share, strict=False):
            behind -= units
            own = Fraction(behind * size + after) / units
            inner = self.unit(depth - 1, begin, end, own)
            weights = self.summed(end - begin, "weights")
            reduced = 2 * (units - 1) / units * weights / level.bandwidth
            worst = max(worst, max(inner, reduced) / units)
        return worst
