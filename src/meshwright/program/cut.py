"""Cut: where the stages of a pipeline begin in the forward ops of a traced micro-batch.

By cost, so that the slowest stage is as fast as can be, or where the user's modules begin.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

from meshwright.errors import PlanError
from meshwright.program.placing import forward_end, repeatable
from meshwright.program.program import Program

__all__ = [
    "MARK",
    "at_modules",
    "cheapest",
    "cuttable",
    "marked",
    "named_places",
    "stage_seconds",
]

MARK = "pipeline"
"""The axis over which a marked value is annotated: no stage has it, so that it lies as it comes."""


def cheapest(
    program: Program,
    stages: int,
    costs: Sequence[float],
    seconds_per_byte: float,
    among: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """Where stages begin so that the slowest is as fast as can be, and little is sent.

    Cuts stand where a module ends, or at the user's marks (`mw.cut`) if there are any.

    Args:
        program: the traced micro-batch.
        stages: how many.
        costs: seconds of each op; a backward op counts for the module of its forward.
        seconds_per_byte: of what crosses a cut.
        among: the places to choose from, instead of those.

    Raises:
        PlanError: there are fewer places to cut at than the stages need.
    """
    marks = marked(program) if among is None else ()
    places = (marks or cuttable(program)) if among is None else among
    if len(places) < stages - 1:
        raise PlanError(
            f"plan asks for {stages} stages, but the traced model "
            f"{'is marked by mw.cut' if marks else 'can be cut'} at {len(places)} places; use "
            f"{len(places) + 1} stages or fewer{', or mark more' if marks else ''}"
        )
    before = _loads(program, places, costs)
    crossing = _crossing(program, places)
    sent = [0.0, *(bytes_ * seconds_per_byte for bytes_ in crossing), 0.0]
    chosen = _balanced(before, sent, stages)
    return tuple(places[k - 1] for k in chosen)


def cuttable(program: Program) -> tuple[int, ...]:
    """The forward ops at which a stage may begin: those whose module is not that of the one before.

    Ops that are repeated do not count, nor does the first.
    """
    repeats, found, module = repeatable(program), [], None
    for number, op in enumerate(program.ops[: forward_end(program)]):
        if number in repeats:
            continue
        if module is not None and op.module != module:
            found.append(number)
        module = op.module
    return tuple(found)


def marked(program: Program) -> tuple[int, ...]:
    """The forward ops that the user marked as beginnings of stages."""
    ops = enumerate(program.ops[: forward_end(program)])
    return tuple(n for n, op in ops if op.base == "meshwright.annotate" and op.args[2] == MARK)


def at_modules(program: Program, cuts: Sequence[str]) -> tuple[int, ...]:
    """Where the modules begin that `cuts` names, in their order.

    Raises:
        PlanError: the traced model has no such module, or it begins before the one named earlier.
    """
    repeats = repeatable(program)
    ops = [(n, op) for n, op in enumerate(program.ops[: forward_end(program)]) if n not in repeats]
    found: list[int] = []
    for place, name in enumerate(cuts):
        mine = [n for n, op in ops if op.module == name or op.module.startswith(f"{name}.")]
        if not mine:
            raise PlanError(
                f"plan cuts the pipeline at module {name!r}, in which the traced model computes "
                "nothing; name one that the forward runs through"
            )
        if mine[0] == ops[0][0]:
            raise PlanError(
                f"plan cuts the pipeline at module {name!r}, with which the model begins, so that "
                "the stage before it would have nothing to do; name the first module of each stage "
                "but the first"
            )
        if found and mine[0] <= found[-1]:
            raise PlanError(
                f"plan cuts the pipeline at module {name!r} after {cuts[place - 1]!r}, but the "
                f"forward runs {name!r} first; name the modules in the order of the forward"
            )
        found.append(mine[0])
    return tuple(found)


def named_places(program: Program) -> dict[int, str]:
    """The places to cut at that `at_modules` finds by a module's name, and the shortest such."""
    found: dict[int, str] = {}
    first: dict[str, int] = {}
    repeats = repeatable(program)
    for number, op in enumerate(program.ops[: forward_end(program)]):
        if number in repeats:
            continue
        parts = op.module.split(".") if op.module else []
        for length in range(1, len(parts) + 1):
            first.setdefault(".".join(parts[:length]), number)
    begin = min(first.values(), default=0)
    places = set(cuttable(program)) - {begin}
    for name, number in sorted(first.items(), key=lambda item: item[0].count(".")):
        if number in places:
            found.setdefault(number, name)
    return dict(sorted(found.items()))


def stage_seconds(
    program: Program, positions: Sequence[int], costs: Sequence[float]
) -> tuple[float, ...]:
    """Seconds of each stage, forward and backward, if stages begin at these forward ops."""
    before = _loads(program, positions, costs)
    return tuple(after - here for here, after in pairwise(before))


def _loads(program: Program, places: Sequence[int], costs: Sequence[float]) -> list[float]:
    """Seconds before each place and in all, forward and backward together."""
    end = forward_end(program)
    module_of: dict[str, list[float]] = {}
    for number, op in enumerate(program.ops):
        if number >= end:
            module_of.setdefault(op.module, []).append(costs[number])
    backward = {module: sum(found) for module, found in module_of.items()}
    forward: dict[str, float] = {}
    for number, op in enumerate(program.ops[:end]):
        forward[op.module] = forward.get(op.module, 0.0) + costs[number]
    total, found = 0.0, [0.0]
    borders = set(places)
    for number, op in enumerate(program.ops[:end]):
        if number in borders:
            found.append(total)
        share = costs[number] / forward[op.module] if forward[op.module] else 0.0
        total += costs[number] + share * backward.get(op.module, 0.0)
    return [*found, total]


def _crossing(program: Program, places: Sequence[int]) -> list[int]:
    """Bytes of forward values that are made before each place and read after it."""
    end, repeats = forward_end(program), repeatable(program)
    made: dict[int, int] = {}
    until: dict[int, int] = {}
    for number, op in enumerate(program.ops[:end]):
        if number in repeats:
            continue
        until.update(dict.fromkeys((v for v in op.inputs if v in made), number))
        made.update(dict.fromkeys(op.results, number))
    found = [0] * len(places)
    for value, number in until.items():
        first, last = bisect_right(places, made[value]), bisect_right(places, number)
        for k in range(first, last):
            found[k] += program.values[value].bytes
    return found


_SLACK = 1.02
"""How much slower than the best the slowest stage may be, where less is sent for it."""


def _balanced(before: Sequence[float], sent: Sequence[float], stages: int) -> list[int]:
    """Numbers of the places (from 1) where stages begin.

    Args:
        before: seconds before each place, from 0 for the start to all of them for the end.
        sent: seconds of what crosses each place; 0 for start and end.
        stages: how many.
    """
    last = len(before) - 1

    def load(begin: int, end: int) -> float:
        return before[end] - before[begin] + sent[end] + sent[begin]

    def latest(limit: float) -> list[int] | None:
        """The last places that keep every stage within the limit; None if none do."""
        found, begin = [], 0
        for stage in range(stages - 1):
            rest = stages - 1 - stage
            end = next((k for k in range(last - rest, begin, -1) if load(begin, k) <= limit), None)
            if end is None:
                return None
            found.append(end)
            begin = end
        return found if load(begin, last) <= limit else None

    low, high = 0.0, load(0, last) + 2 * max(sent)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if latest(middle) is not None else (middle, high)
    return _least_sent(before, sent, stages, high * _SLACK)


def _least_sent(
    before: Sequence[float], sent: Sequence[float], stages: int, limit: float
) -> list[int]:
    """Of the cuts whose stages keep within the limit, those that send least."""
    last = len(before) - 1
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for stage in range(stages - 1):
        found: dict[int, tuple[float, int]] = {}
        for begin, (so_far, _) in best[-1].items():
            for end in range(begin + 1, last - (stages - 2 - stage)):
                if before[end] - before[begin] > limit:
                    break
                if before[end] - before[begin] + sent[begin] + sent[end] > limit:
                    continue
                total = so_far + sent[end]
                if end not in found or total < found[end][0]:
                    found[end] = (total, begin)
        best.append(found)
    fit = {
        k: total for k, (total, _) in best[-1].items() if before[-1] - before[k] + sent[k] <= limit
    }
    end = min(fit, key=lambda k: (fit[k], k))
    chosen = []
    for stage in range(stages - 1, 0, -1):
        chosen.append(end)
        end = best[stage][end][1]
    return chosen[::-1]
