"""Keep: which forward values are saved for the backward, by the policies that ask for no search.

full        what goes from block to block (Chen et al. 2016); blocks are the layers that repeat, or,
            where none do, segments whose borders and largest inside together are least
selective   that, and what is dear to compute again: products with weights, convolutions, fused
            attention; not what is made of them element by element or row by row, nor scores of
            attention (Korthikanti et al. 2022, section 5)
marks       all but what the user's `torch.utils.checkpoint` regions make for themselves
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise

from meshwright.errors import PlanError
from meshwright.program.cost import flops
from meshwright.program.donate import VIEWS
from meshwright.program.program import Program
from meshwright.program.remat import Forward
from meshwright.program.repeat import repeated

__all__ = ["POLICIES", "borders", "full", "marked", "selective"]

_DEAR = ("sort", "topk", "_fft", "grid_sampler", "lstm", "gru", "cumsum", "linalg", "cdist")
"""In the name of an op that has no product, but is much work."""

_PLACES = 160
"""Places between which segments are chosen where no layers repeat."""


def full(program: Program) -> frozenset[int]:
    """What goes from block to block; the last block's values are wanted at once, and stay."""
    forward = Forward.of(program)
    return frozenset(_crossing(forward, borders(forward)) | _last(forward, borders(forward)))


def selective(program: Program) -> frozenset[int]:
    """What goes from block to block, and what is dear; the last block's values stay."""
    forward = Forward.of(program)
    places = borders(forward)
    fixed = _crossing(forward, places) | _last(forward, places)
    numbers = _dear(forward)
    dear = {v for v, number in forward.makers.items() if number in numbers} - forward.held
    return frozenset(fixed | _nearer(forward, fixed, dear))


def marked(program: Program) -> frozenset[int]:
    """What no region makes, and what is read outside of the region that makes it.

    Raises:
        PlanError: there are no regions.
    """
    forward = Forward.of(program)
    if not any(op.region for op in program.ops[: forward.end]):
        raise PlanError(
            "plan asks for remat=marks, but the model has none; wrap what is to be computed again "
            "in torch.utils.checkpoint.checkpoint, or use remat=full or remat=selective"
        )
    region = {v: program.ops[number].region for v, number in forward.makers.items()}
    found = {value for value, mark in region.items() if not mark}
    for op in program.ops:
        for value in op.inputs:
            root = forward.root[value]
            if root in region and op.region != region[root]:
                found.add(root)
    return frozenset(found - forward.held)


POLICIES: dict[str, Callable[[Program], frozenset[int]]] = {
    "full": full,
    "selective": selective,
    "marks": marked,
}
"""By the word that a plan has for it."""


def borders(forward: Forward) -> tuple[int, ...]:
    """The numbers of the forward ops with which a block begins, the first left out."""
    found = tuple(sorted(n for n in repeated(forward.program) if 0 < n < forward.end))
    return found or _segments(forward)


def _crossing(forward: Forward, places: Sequence[int]) -> set[int]:
    """Roots that one block makes and a later one reads."""
    found: set[int] = set()
    for number in range(forward.end):
        block = bisect_right(places, number)
        for value in forward.read(number):
            if bisect_right(places, forward.makers[value]) < block:
                found.add(value)
    return found


def _last(forward: Forward, places: Sequence[int]) -> set[int]:
    """Roots that the last block makes."""
    begin = places[-1] if places else forward.end
    return {v for v, n in forward.makers.items() if n >= begin and v not in forward.held}


def _segments(forward: Forward) -> tuple[int, ...]:
    """Where segments begin so that what crosses, and the largest inside, together are least."""
    inside, crossing = _profile(forward)
    total = inside[-1]
    places = _candidates(crossing)
    best: tuple[int, tuple[int, ...]] = (total, ())
    parts = 2
    while total and parts <= 2 * len(places) ** 0.5 + 2:
        found = _split(places, inside, crossing, total // parts)
        if found is not None:
            ends = [0, *found, forward.end]
            most = max(inside[b] - inside[a] for a, b in pairwise(ends))
            best = min(best, (sum(crossing[p] for p in found) + most, found))
        parts += 1
    return best[1]


def _profile(forward: Forward) -> tuple[list[int], list[int]]:
    """Bytes that the backward wants of what is made before each op; bytes that cross there."""
    values, end = forward.program.values, forward.end
    inside, change = [0] * (end + 1), [0] * (end + 2)
    until: dict[int, int] = {}
    for number in range(end):
        until.update(dict.fromkeys(forward.read(number), number))
    wanted = forward.direct
    for value, number in forward.makers.items():
        if value in forward.held:
            continue
        inside[number + 1] += values[value].bytes if value in wanted else 0
        if until.get(value, -1) > number:
            change[number + 1] += values[value].bytes
            change[until[value] + 1] -= values[value].bytes
    crossing = [0] * (end + 1)
    for place in range(1, end + 1):
        inside[place] += inside[place - 1]
        crossing[place] = crossing[place - 1] + change[place]
    return inside, crossing


def _candidates(crossing: Sequence[int]) -> list[int]:
    """Places that little crosses: the narrowest of each stretch."""
    inner = range(1, len(crossing) - 1)
    stretch = max(1, len(inner) // _PLACES)
    return [
        min(inner[k : k + stretch], key=crossing.__getitem__) for k in range(0, len(inner), stretch)
    ]


def _split(
    places: Sequence[int], inside: Sequence[int], crossing: Sequence[int], most: int
) -> tuple[int, ...] | None:
    """The borders that least crosses, with no more than `most` inside any segment."""
    stops = [0, *places, len(inside) - 1]
    cost: list[float] = [0.0] + [float("inf")] * (len(stops) - 1)
    came = [0] * len(stops)
    for b in range(1, len(stops)):
        own = crossing[stops[b]] if b < len(stops) - 1 else 0
        for a in range(b - 1, -1, -1):
            if inside[stops[b]] - inside[stops[a]] > most and a < b - 1:
                break
            if cost[a] + own < cost[b]:
                cost[b], came[b] = cost[a] + own, a
    found: list[int] = []
    at = came[-1]
    while at:
        found.append(stops[at])
        at = came[at]
    return tuple(found[::-1])


def _of_weights(program: Program) -> frozenset[int]:
    """Parameters, and views and casts of them."""
    found = {value for name, value in program.inputs if name.startswith("model/")}
    for op in program.ops:
        same = op.base in VIEWS or op.base == "aten._to_copy"
        if same and op.inputs[0] in found:
            found.update(op.results)
    return frozenset(found)


def _dear(forward: Forward) -> set[int]:
    """The forward ops that are much work for the bytes that they make.

    A product without weights that only leads to another such is not: scores of attention.
    """
    program = forward.program
    ops = program.ops[: forward.end]
    weights = _of_weights(program)
    found = {n for n, op in enumerate(ops) if any(word in op.base for word in _DEAR)}
    products = {n for n, op in enumerate(ops) if flops(op, program)}
    bare = {n for n in products if not weights.intersection(ops[n].inputs)}
    leads: set[int] = set()  # roots that go into a product without weights, as they are or changed
    for number in range(forward.end - 1, -1, -1):
        made = forward.root_made(number)
        if number in bare or (number not in products and made & leads):
            leads.update(forward.read(number))
    scores = {n for n in bare if forward.root_made(n) & leads}
    return found | (products - scores)


def _nearer(forward: Forward, fixed: set[int], dear: set[int]) -> set[int]:
    """Dear values that are saved; where one only serves another no larger, that one instead.

    A residual sum in place of the projection that it adds: as many bytes, and less to repeat.
    """
    values = forward.program.values
    saved = forward.saved(fixed | dear) - fixed
    waiting = sorted(saved)
    while waiting:
        value = waiting.pop()
        again = forward.repeats(fixed | saved)
        readers = [number for number in again if value in forward.read(number)]
        if value in forward.direct or len(readers) != 1:
            continue
        made = [v for v in forward.program.ops[readers[0]].results if v in forward.makers]
        if len(made) == 1 and values[made[0]].bytes <= values[value].bytes:
            saved = saved - {value} | {made[0]}
            waiting.append(made[0])
    return saved
