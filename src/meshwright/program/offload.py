"""Offload in an instruction list: what rests in a tier is loaded before it is read, and stashed.

    Load model/w -> ~here/w     before the Run before the first one that reads it: copied meanwhile
    Wait ~here/w -> here/w      before the first one that does
    Run ... here/w ...
    Free here/w                 after the last one near by; the next use loads it again

    Stash 3:17 -> reduced/w     right after 3:17 is made, which is then freed

The tier is the instruction's axis. A value is loaded ahead by one Run, so that no more than the
weights of two segments are there at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from meshwright.plan.offload import Part
from meshwright.program.donate import VIEWS
from meshwright.program.instruction import Instruction, InstructionList
from meshwright.program.program import Op, Program, map_refs

__all__ = ["FLIGHT", "HERE", "MOVED", "offloaded", "viewed_again"]

MOVED: Final[tuple[Part, ...]] = ("params", "gradients")
"""The parts of a plan's `offload` that instructions move."""

HERE = "here/"
"""How the name begins of what was loaded from a tier."""

FLIGHT: Final = 32 << 20
"""Bytes on their way to tiers at once: what leaves is not free before it is there."""

_PURE = VIEWS - {"aten.add_"}
_SUMS = ("gradient/", "reduced/")
_NEAR = 1  # Runs between two uses across which a value stays


def offloaded(
    program: InstructionList, weights: Collection[str], tiers: Mapping[Part, str]
) -> InstructionList:
    """The list with resting values loaded where they are read and stashed where they are made.

    Args:
        program: a rank's.
        weights: names (`model/...`) of what rests where `tiers` has `params`.
        tiers: of `params` and `gradients`, where they are offloaded.
    """
    held = frozenset(weights) if "params" in tiers else frozenset()
    body = program.body
    if "gradients" in tiers:
        body = _stashed(body, tiers["gradients"])
    return replace(program, body=_loaded(body, held, tiers))


def _is_view(op: Op) -> bool:
    """Whether it views its one operand."""
    return op.base in _PURE and len(op.results) == len(op.inputs) == 1 and not op.packed


def viewed_again(program: Program, *, all_values: bool = False) -> Program:
    """The program with views of weights made anew where the backward reads them.

    A view that the backward took from the forward would keep the weight's storage until then. With
    `all_values`, views of all that the forward makes.
    """
    weights = {value for name, value in program.inputs if name.startswith("model/")}
    if all_values:
        weights |= {value for op in program.ops if op.phase == "forward" for value in op.results}
    views: dict[int, Op] = {}
    values, ops = list(program.values), list[Op]()

    def again(value: int) -> int:
        op = views.get(value)
        if op is None:
            return value
        source, made = again(op.inputs[0]), len(values)
        values.append(program.values[value])
        args = map_refs(op.args, lambda _: source)
        ops.append(replace(op, args=args, outputs=(made,), phase="backward"))
        return made

    for op in program.ops:
        if op.phase == "forward" and _is_view(op) and op.inputs[0] in weights | views.keys():
            views[op.results[0]] = op
        if op.phase == "backward" and any(value in views for value in op.inputs):
            number = {value: again(value) for value in dict.fromkeys(op.inputs)}
            args = map_refs(op.args, number.__getitem__)
            ops.append(replace(op, args=args, kwargs=map_refs(op.kwargs, number.__getitem__)))
        else:
            ops.append(op)
    return replace(program, values=tuple(values), ops=tuple(ops))


def _stashed(body: Sequence[Instruction], tier: str) -> tuple[Instruction, ...]:
    """Sums go to the tier once they are made and read, not where their micro-batch ends."""
    used: dict[str, int] = {}  # where a value was made, or read, last
    after: dict[int, list[Instruction]] = defaultdict(list)
    found: list[Instruction] = []
    for place, each in enumerate(body):
        if each.kind == "Stash":
            pairs = list(zip(each.inputs, each.outputs, strict=True))
            sums = [pair for pair in pairs if pair[1].startswith(_SUMS)]
            rest = [pair for pair in pairs if not pair[1].startswith(_SUMS)]
            for source, name in sums:
                after[used.get(source, place - 1)] += _put(body, place, source, name, tier)
            left = tuple(source for source, _ in rest), tuple(name for _, name in rest)
            found.append(replace(each, inputs=left[0], outputs=left[1]))
        else:
            found.append(each)
        if each.kind != "Free":
            used.update(dict.fromkeys((*found[-1].inputs, *found[-1].outputs), place))
    return tuple(
        one
        for place, each in enumerate(found)
        for one in (*((each,) if _says(each) else ()), *after[place])
    )


def _says(instruction: Instruction) -> bool:
    """Whether anything is left of a Stash."""
    return instruction.kind != "Stash" or bool(instruction.inputs)


def _put(
    body: Sequence[Instruction], place: int, source: str, name: str, tier: str
) -> list[Instruction]:
    put = Instruction("Stash", None, body[place].microbatch, 0, (source,), (name,), tier)
    read = any(
        source in each.inputs and each.kind not in ("Free", "Stash") for each in body[place + 1 :]
    )
    free = Instruction("Free", None, body[place].microbatch, 0, (source,))
    return [put] if read else [put, free]


@dataclass(slots=True)
class _Span:
    """Neighbouring instructions that read a resting value."""

    name: str
    first: int
    last: int
    runs: int  # how many Runs came before its last reader


@dataclass(slots=True)
class _Spans:
    """The spans of a list, found in its order."""

    closed: list[_Span] = field(default_factory=list)
    open: dict[str, _Span] = field(default_factory=dict)

    def read(self, name: str, place: int, runs: int) -> None:
        """An instruction reads a resting value."""
        span = self.open.get(name)
        if span is not None and runs - span.runs <= _NEAR:
            span.last, span.runs = place, runs
            return
        self.close(name)
        self.open[name] = _Span(name, place, place, runs)

    def close(self, name: str) -> None:
        """What is read from here on is loaded anew."""
        if (span := self.open.pop(name, None)) is not None:
            self.closed.append(span)

    def all(self) -> list[_Span]:
        """Every span, once the list ends."""
        for name in list(self.open):
            self.close(name)
        return self.closed


def _loaded(
    body: Sequence[Instruction], held: frozenset[str], tiers: Mapping[Part, str]
) -> tuple[Instruction, ...]:
    spans, runs = _Spans(), 0
    ahead: list[int] = []  # of each instruction, where the Run before it stands
    last = 0
    for place, each in enumerate(body):
        ahead.append(last)
        for name in each.inputs if each.kind in ("Run", "Start") else ():
            if name in held or (name.startswith(_SUMS) and "gradients" in tiers):
                spans.read(name, place, runs)
        if each.kind == "Stash":
            for name in each.outputs:
                spans.close(name)
        if each.kind in ("Update", "Commit"):
            for name in list(spans.open):
                spans.close(name)
        if each.kind == "Run":
            last, runs = place, runs + 1
    return _written(body, spans.all(), ahead, tiers)


def _written(
    body: Sequence[Instruction],
    spans: Sequence[_Span],
    ahead: Sequence[int],
    tiers: Mapping[Part, str],
) -> tuple[Instruction, ...]:
    """The body with each span's Load, Wait and Free, and its readers reading what was loaded."""
    before: dict[int, list[Instruction]] = defaultdict(list)
    waits: dict[int, list[Instruction]] = defaultdict(list)
    after: dict[int, list[Instruction]] = defaultdict(list)
    reads: dict[int, dict[str, str]] = defaultdict(dict)
    made = _makers(body)
    for span in spans:
        tier = tiers["gradients" if span.name.startswith(_SUMS) else "params"]
        here, micro = HERE + span.name, body[span.first].microbatch
        begin = max(ahead[span.first], _made_before(made, span))
        load = Instruction("Load", None, micro, 0, (span.name,), (f"~{here}",), tier)
        before[begin].append(load)
        waits[span.first].append(Instruction("Wait", None, micro, 0, (f"~{here}",), (here,), tier))
        after[span.last].append(Instruction("Free", None, micro, 0, (here,)))
        for place in range(span.first, span.last + 1):
            reads[place][span.name] = here
    found: list[Instruction] = []
    for place, each in enumerate(body):
        found += [*before[place], *waits[place]]
        names = reads[place]
        if each.kind in ("Run", "Start"):
            found.append(replace(each, inputs=tuple(names.get(n, n) for n in each.inputs)))
        else:
            found.append(each)
        found += after[place]
    return tuple(found)


def _makers(body: Sequence[Instruction]) -> dict[str, list[int]]:
    """Where each sum is stashed."""
    found: dict[str, list[int]] = defaultdict(list)
    for place, each in enumerate(body):
        if each.kind == "Stash":
            for name in each.outputs:
                found[name].append(place)
    return found


def _made_before(made: Mapping[str, Sequence[int]], span: _Span) -> int:
    """The first place at which what a span reads is there."""
    return max((place + 1 for place in made.get(span.name, ()) if place < span.first), default=0)
