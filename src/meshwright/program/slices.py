"""Slices of a batch: the squared norm of the gradient that each of them makes by itself.

Where a step's slices are what its ranks compute anyway, each has the gradient of its own before
ranks' are summed: `meshwright.square` is told over which axes it takes the terms of a partial sum
one by one, so that it costs a pass over the gradient and sends nothing. Over all other axes, and
where slices are whole micro-batches, sums are paid for first.

What ranks compute of their own samples is what these would be by themselves only where nothing
mixes samples. A count of a micro-batch (of its tokens that are not masked) may go into a loss if
all slices have as many, which each step sees: R ranks' counts are equal if R times the sum of their
squares is the square of their sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from meshwright.errors import PlanError, UserCodeError
from meshwright.program.layout import Partial
from meshwright.program.partition import COLLECTIVES, Local
from meshwright.program.program import Op, Phase, Program, Ref, Value

__all__ = ["SQUARE", "SQUARES", "require_apart", "require_even", "squared"]

SQUARES = "total/square/"
"""How sums of squares are called, before the parameter's name."""

SQUARE = "meshwright.square"
"""The op's name."""

_APART, _TOGETHER = "count/apart/", "count/together/"
_ROUNDING = 1e-12
_LEARNED = ("model/", "buffer/", "value/")
_VARIED = ("batch/", "scale")
_MIXING = COLLECTIVES | {"comm.mask"}  # what is masked counts once for all ranks
_LOSSES = ("aten.nll_loss_forward", "aten.nll_loss2d_forward")
"""Their second result is a count of the batch."""
_BACK = ("aten.nll_loss_backward", "aten.nll_loss2d_backward")
"""They take that count, and have no use for it but in a mean, which is traced as a division."""


def squared(unit: Program, apart: Sequence[str]) -> Program:
    """The traced micro-batch with a squared norm of each gradient, right after that is made.

    Args:
        unit: of which each gradient `gradient/name` gives a `total/square/name` in float64.
        apart: axes whose ranks have slices of their own.
    """
    values, made = list(unit.values), unit.producers()
    after: dict[int, list[Op]] = {}
    outputs = list(unit.outputs)

    def add(name: str, value: int, axes: Sequence[str], phase: Phase) -> None:
        place = made.get(value, len(unit.ops) - 1)
        source = unit.ops[place]
        op = Op(
            f"{SQUARE}.default", (Ref(value), ",".join(axes)), (), (len(values),),
            phase=phase, module=source.module, source=source.source,
        )  # fmt: skip
        after.setdefault(place, []).append(op)
        outputs.append((name, len(values)))
        values.append(Value("float64", ()))

    for name, value in unit.outputs:
        if name.startswith("gradient/"):
            add(SQUARES + name.removeprefix("gradient/"), value, apart, "backward")
    for value in sorted(_counts(unit)) if after and apart else ():
        where = f"{unit.ops[made[value]].source}#{value}"
        add(f"total/{_APART}{where}", value, apart, "forward")
        add(f"total/{_TOGETHER}{where}", value, (), "forward")
    ops = (op for place, own in enumerate(unit.ops) for op in (own, *after.get(place, ())))
    return replace(unit, values=tuple(values), ops=tuple(ops), outputs=tuple(outputs))


def _counts(unit: Program) -> set[int]:
    """Single numbers, made of the batch alone, that go into what is made of the weights."""
    batch = {value for name, value in unit.inputs if name.startswith("batch/")}
    learned = {value for name, value in unit.inputs if name.startswith(_LEARNED)}
    found: set[int] = set()
    for op in unit.ops:
        if learned.intersection(op.inputs):
            alone = batch.difference(learned).intersection(op.inputs)
            found |= {v for v in alone if unit.values[v].elements == 1 and op.base not in _BACK}
            learned.update(_learned(op))
        if batch.intersection(op.inputs):
            batch.update(op.results)
    return found - {value for _, value in unit.inputs}


def _learned(op: Op) -> tuple[int, ...]:
    """What an op makes of weights, where it reads any."""
    return op.results[:1] if op.base in _LOSSES else op.results


def require_apart(local: Local, over: Sequence[str], remedy: str) -> None:
    """Return if what each rank squares is made of its own samples, and of nothing else.

    Args:
        local: a rank's program.
        over: the axes, longer than 1, whose ranks have slices of their own.
        remedy: what to do otherwise.

    Raises:
        PlanError: something mixes the samples of ranks, or counts once for all of them.
    """
    program = local.program
    learned = {value for name, value in program.inputs if name.startswith(_LEARNED)}
    varied = {value for name, value in program.inputs if name.startswith(_VARIED)} | learned
    mixed: dict[int, Op] = {}
    for op in program.ops:
        found = next((mixed[value] for value in op.inputs if value in mixed), None)
        if op.base == SQUARE:
            lies = local.origin[op.results[0]][1]
            alone = not op.args[1] or all(isinstance(lies.on(axis), Partial) for axis in over)
            if op.args[1] and (found is not None or not alone):
                raise _mixes(found or op, remedy)
            continue
        if op.name in _MIXING and op.args[1] in over and varied.intersection(op.inputs):
            count = op.name != "comm.mask" and program.values[op.results[0]].elements == 1
            fine = _of_state(op) or (count and not learned.intersection(op.inputs))
            found = found or (None if fine else op)
        if learned.intersection(op.inputs):
            learned.update(_learned(op))
        if varied.intersection(op.inputs):
            varied.update(op.results)
        if found is not None:
            mixed |= dict.fromkeys(op.results, found)
    for name, value in program.outputs:
        if name.startswith("value/") and value in mixed:  # another task reads it
            raise _mixes(mixed[value], remedy)


def _of_state(op: Op) -> bool:
    """Whether a collective makes weights whole."""
    return str(dict(op.kwargs).get("value", "")).startswith("model/")


def _mixes(op: Op, remedy: str) -> PlanError:
    where = op.source or op.module or "the loss"
    if op.base == SQUARE or op.name == "comm.mask":
        what = f"what {where} makes does not come of samples one by one"
    else:
        what = f"{where} mixes the samples of ranks ({op.name.removeprefix('comm.')})"
    return PlanError(
        f"adascale squares the gradients of slices of the batch, which ranks make of their own "
        f"samples, but {what}; {remedy}"
    )


def require_even(totals: Mapping[str, float], ranks: int, when: str) -> None:
    """Return if what a loss counts is as much in each slice of a micro-batch.

    Args:
        totals: of the step, by name.
        ranks: that have slices of their own.
        when: it was.

    Raises:
        UserCodeError: it is not; names the line.
    """
    for name, terms in totals.items():
        if not name.startswith(_APART):
            continue
        where, together = name.removeprefix(_APART), totals[name.replace(_APART, _TOGETHER)]
        if not ranks * terms <= together * (1 + _ROUNDING):
            raise UserCodeError(
                f"in {when} the slices of adascale differ in what "
                f"{where.partition('#')[0]} counts over a micro-batch (tokens that are not "
                "masked), so that their gradients would not be those of slices by themselves; "
                "return (sum, weight) from the loss, or use as many microbatches as slices"
            )
