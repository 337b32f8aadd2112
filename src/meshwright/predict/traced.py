"""Traced: the layers of a traced micro-batch, and what each costs.

Forward ops in a row of one layer (`blocks.3` of `blocks.3.mlp.up`) are one node, or of one module
where no layer is; a layer that runs twice is two, `blocks.3` and `blocks.3#2`. So any prefix of
the nodes is a legal cut of the program.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from meshwright.errors import UsageError, nearest
from meshwright.predict.antichain import prefixes
from meshwright.predict.layers import Layer, LayerGraph, graph_of
from meshwright.predict.machine import Level, Memory
from meshwright.predict.partition import Partition, partition
from meshwright.program.placing import forward_end, repeatable
from meshwright.program.program import Op, Program
from meshwright.program.repeat import layer_of

__all__ = ["TracedLayers", "measured", "traced_layers"]


@dataclass(frozen=True, slots=True)
class TracedLayers:
    """The layers of a program.

    Attributes:
        graph: of them, in the order of the trace.
        begins: the number of each layer's first op.
    """

    graph: LayerGraph
    begins: tuple[int, ...]

    def partition(
        self, levels: Sequence[Level], *, straight: bool = False, memory: Memory | None = None
    ) -> Partition:
        """The best partition into stages that are rows of layers."""
        states = prefixes(self.graph)
        return partition(self.graph, levels, straight=straight, memory=memory, states=states)

    def positions(self, found: Partition) -> tuple[int, ...]:
        """The forward ops at which the stages of a partition begin, but the first's."""
        return tuple(self.begins[stage.layers[0]] for stage in found.stages[1:])


@dataclass(slots=True)
class _Run:
    """Forward ops in a row of one layer."""

    key: str
    begin: int
    forward: dict[str, float] = field(default_factory=dict)
    backward: float = 0.0
    weights: set[int] = field(default_factory=set)
    made: set[int] = field(default_factory=set)


def traced_layers(
    program: Program, costs: Sequence[float], *, by_module: bool = False
) -> TracedLayers:
    """The layers of a traced micro-batch.

    What is repeated wherever it is read (masks, views of weights) begins no layer. Weights that
    several layers read count at each. A layer's backward is that of its modules' ops.

    Args:
        program: forward and backward together.
        costs: seconds of each op.
        by_module: every module is a layer of its own.
    """
    repeats = repeatable(program)
    numbers = range(forward_end(program))
    runs = _runs(program, [n for n in numbers if n not in repeats], by_module=by_module)
    _charge(program, runs, costs)
    edges = _connect(program, runs, repeats)
    times: Counter[str] = Counter()
    layers = []
    for run in runs:
        times[run.key] += 1
        name = run.key or "(root)"
        name = f"{name}#{times[run.key]}" if times[run.key] > 1 else name
        sent = sum(program.values[value].bytes for value in run.made)
        held = sum(program.values[value].bytes for value in run.weights)
        forward = sum(run.forward.values())
        layers.append(Layer(name, program.ops[run.begin].name, forward, run.backward, sent, held))
    return TracedLayers(graph_of(layers, edges), tuple(run.begin for run in runs))


def measured(traced: TracedLayers, seconds: Mapping[str, tuple[float, float]]) -> TracedLayers:
    """The layers with measured seconds, (forward, backward) by layer.

    Those of a layer that runs several times are split evenly.

    Raises:
        UsageError: a layer was not measured.
    """
    owners = [layer.name.partition("#")[0] for layer in traced.graph.layers]
    runs = Counter(owners)
    layers = []
    for layer, owner in zip(traced.graph.layers, owners, strict=True):
        if owner not in seconds:
            raise UsageError(
                f"layer {owner!r} has no measured seconds; each layer of the traced model needs "
                f"its forward's and backward's: {nearest(owner, tuple(seconds))}"
            )
        forward, backward = (part / runs[owner] for part in seconds[owner])
        layers.append(replace(layer, forward=forward, backward=backward))
    return replace(traced, graph=replace(traced.graph, layers=tuple(layers)))


def _runs(program: Program, numbers: Sequence[int], *, by_module: bool) -> list[_Run]:
    runs: list[_Run] = []
    for number in numbers:
        key = _key(program.ops[number], by_module=by_module)
        if not runs or runs[-1].key != key:
            runs.append(_Run(key, number))
    return runs


def _key(op: Op, *, by_module: bool) -> str:
    return op.module if by_module else layer_of(op) or op.module


def _charge(program: Program, runs: Sequence[_Run], costs: Sequence[float]) -> None:
    """Give each op's seconds to a run: a forward op's by its place, a backward op's by its module.

    A module in several runs has its backward shared as its forward is.
    """
    end = forward_end(program)
    for number, run in _placed(runs, end):
        module = program.ops[number].module
        run.forward[module] = run.forward.get(module, 0.0) + costs[number]
    owed: dict[str, float] = {}
    for number in range(end, len(program.ops)):
        module = program.ops[number].module
        owed[module] = owed.get(module, 0.0) + costs[number]
    for module, seconds in owed.items():
        sharing = [run for run in runs if module in run.forward] or [runs[-1]]
        whole = sum(run.forward.get(module, 0.0) for run in sharing)
        for run in sharing:
            share = run.forward[module] / whole if whole else 1 / len(sharing)
            run.backward += seconds * share


def _placed(runs: Sequence[_Run], end: int) -> list[tuple[int, _Run]]:
    """Each forward op with the run that it is in; what comes before all runs is in the first."""
    found, place = [], 0
    for number in range(end):
        while place + 1 < len(runs) and runs[place + 1].begin <= number:
            place += 1
        found.append((number, runs[place]))
    return found


def _connect(
    program: Program, runs: Sequence[_Run], repeats: frozenset[int]
) -> list[tuple[int, int]]:
    """The edges between runs; notes what each makes for others, and the weights that it reads."""
    state = {value: {value} for name, value in program.inputs if name.startswith("model/")}
    maker: dict[int, int] = {}
    edges: dict[tuple[int, int], None] = {}
    numbers = {id(run): place for place, run in enumerate(runs)}
    for number, run in _placed(runs, forward_end(program)):
        op, here = program.ops[number], numbers[id(run)]
        weights = {weight for value in op.inputs for weight in state.get(value, ())}
        if number in repeats:
            state.update(dict.fromkeys(op.results, weights))
            continue
        run.weights |= weights
        for value in op.inputs:
            if maker.get(value, here) != here:
                edges[maker[value], here] = None
                runs[maker[value]].made.add(value)
        maker.update(dict.fromkeys(op.results, here))
    return list(edges)
