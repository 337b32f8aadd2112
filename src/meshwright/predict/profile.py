"""Profile: a graph of layers as PipeDream's profiler writes it.

    layer       node4 -- Linear(2, 3) -- forward_compute_time=0.5, backward_compute_time=1.0,
                activation_size=24.0, parameter_size=36.0     (all in one line)
    edge        node1 -- node4                                (the line begins with a tab)

Times are milliseconds, sizes bytes; those of several results are `[24.0; 8.0]`. A fourth field of
a layer, `stage_id=1`, says in which stage it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

from meshwright.errors import UsageError
from meshwright.predict.layers import Layer, LayerGraph, graph_of

__all__ = ["read_profile", "write_profile", "computing"]

_FIELDS = ("forward_compute_time", "backward_compute_time", "activation_size", "parameter_size")
_TIMES = _FIELDS[:2]


def read_profile(text: str) -> LayerGraph:
    """The graph of a profile. Stages that it names are not read.

    Raises:
        UsageError: a line is not as it must be, or the edges go in a circle.
    """
    layers: list[Layer] = []
    edges: list[tuple[int, int]] = []
    numbers: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        if line[0].isspace():
            edge = _edge(line, number, numbers)
            if edge in edges:
                raise _bad(number, line.strip(), "this edge was given before", "keep one of them")
            edges.append(edge)
            continue
        layer = _layer(line, number)
        if layer.name in numbers:
            rule = "a layer of this name was given before"
            raise _bad(number, layer.name, rule, "give each layer a name of its own")
        numbers[layer.name] = len(layers)
        layers.append(layer)
    if not layers:
        raise UsageError(
            "the profile has no layers; it needs a line 'node1 -- Linear -- "
            f"{', '.join(f'{field}=0' for field in _FIELDS)}' for each"
        )
    return graph_of(layers, edges)


def write_profile(graph: LayerGraph, stages: Sequence[int] | None = None) -> str:
    """The profile of a graph, that reads back as it is; with the stage of each layer if given."""
    lines = []
    for number, layer in enumerate(graph.layers):
        times = (_shifted(layer.forward, 3), _shifted(layer.backward, 3))
        values = (*times, repr(float(layer.activations)), repr(float(layer.weights)))
        costs = ", ".join(f"{field}={v}" for field, v in zip(_FIELDS, values, strict=True))
        staged = "" if stages is None else f" -- stage_id={stages[number]}"
        lines.append(f"{layer.name} -- {layer.text} -- {costs}{staged}")
    for maker, reader in graph.edges:
        lines.append(f"\t{graph.layers[maker].name} -- {graph.layers[reader].name}")
    return "\n".join(lines) + "\n"


def computing(graph: LayerGraph) -> LayerGraph:
    """The graph without what is no work of a stage's: the inputs, and parts that nobody reads.

    An input's time is the data loader's, and its place is the first stage whatever is chosen.
    """
    makers = graph.makers()
    inputs = [
        number
        for number, layer in enumerate(graph.layers)
        if layer.text.startswith("Input") and not makers[number]
    ]
    rest = graph.without(inputs)
    readers = rest.readers()
    unread = [
        number
        for number, layer in enumerate(rest.layers)
        if layer.text.startswith("__getitem__") and not readers[number]
    ]
    return rest.without(unread)


def _layer(line: str, number: int) -> Layer:
    parts = line.strip().split(" -- ")
    if len(parts) not in (3, 4):
        rule = f"a layer's line has 'name -- description -- costs', and this one {len(parts)} parts"
        raise _bad(number, line.strip(), rule, "separate them by ' -- '; edges begin with a tab")
    forward, backward, activations, weights = _costs(parts[2], number)
    return Layer(parts[0], parts[1], forward, backward, activations, weights)


def _costs(text: str, number: int) -> tuple[float, ...]:
    pairs = [part.partition("=") for part in text.split(", ")]
    if tuple(name for name, _, _ in pairs) != _FIELDS:
        rule = f"the costs of a layer are {', '.join(_FIELDS)}, in this order"
        raise _bad(number, text, rule, "write each as name=number, with ', ' between")
    return tuple(_number(name, value, number) for name, _, value in pairs)


def _number(name: str, text: str, number: int) -> float:
    """A cost in seconds or bytes; the sum of those in brackets."""
    listed = text.startswith("[") and text.endswith("]")
    parts = text[1:-1].split("; ") if listed else [text]
    try:
        values = [Decimal(part).scaleb(-3 if name in _TIMES else 0) for part in parts]
    except InvalidOperation:
        raise _bad(number, f"{name}={text}", "a number is needed", "give 0 if there is none") from (
            None
        )
    # Of text through decimals, so that milliseconds become the same seconds as they came from.
    total = float(values[0]) if len(values) == 1 else math.fsum(map(float, values))
    if not math.isfinite(total) or total < 0:
        rule = "costs are finite and not negative"
        raise _bad(number, f"{name}={text}", rule, "measure it again, or give 0")
    return total


def _edge(line: str, number: int, numbers: dict[str, int]) -> tuple[int, int]:
    names = line.strip().split(" -- ")
    if len(names) != 2:
        rule = "an edge's line has two layers' names"
        raise _bad(number, line.strip(), rule, "write it as a tab and 'node1 -- node2'")
    for name in names:
        if name not in numbers:
            rule = "no line before gives a layer of this name"
            raise _bad(number, name, rule, "give all layers before the edges, or correct the name")
    return numbers[names[0]], numbers[names[1]]


def _shifted(value: float, places: int) -> str:
    """A number times a power of ten, exactly."""
    return str(Decimal(repr(float(value))).scaleb(places))


def _bad(number: int, value: str, rule: str, remedy: str) -> UsageError:
    return UsageError(f"profile line {number}: {value!r}: {rule}; {remedy}")
