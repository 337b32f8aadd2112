"""Conflicts that propagation resolved: ops whose operands lie split by different factors.

Per axis an op carries one factor. An operand that lies split by another one is moved: that is what
its losing costs. Found from the completed program, so that it tells what is, not how it came about.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from meshwright.plan.mesh import Axis
from meshwright.program.assemble import Compiled
from meshwright.program.explain import Sent, sent
from meshwright.program.layout import Layout, Shard
from meshwright.program.partition import Local
from meshwright.program.program import Op, Program
from meshwright.program.propagate import Completed
from meshwright.program.rules import Carry, Rule, carry_of, shard_of

__all__ = ["Conflict", "conflicts"]


@dataclass(frozen=True, slots=True)
class Conflict:
    """An op that could not keep one operand where it lies.

    Attributes:
        op: as torch names it.
        axis: over which operands lie differently.
        source: the user's line.
        module: path of the module.
        phase: forward or backward.
        winner: `operand 0`, or `its result`, with the layout that the op keeps there.
        loser: the operand, with its layout.
        loser_bytes: its size, whole.
        wanted: the layout that the loser is brought to.
        bytes: that a rank sends per step to bring it there; 0 where another op needed it so too.
        count: ops per step.
    """

    op: str
    axis: str
    source: str
    module: str
    phase: str
    winner: str
    loser: str
    loser_bytes: int
    wanted: str
    bytes: int
    count: int

    def as_json(self) -> dict[str, Any]:
        """As a mapping."""
        return asdict(self)


def conflicts(compiled: Compiled, axes: Sequence[Axis]) -> tuple[Conflict, ...]:
    """The conflicts of a step, those alike in all but number as one, most expensive first."""
    calls = list(sent(compiled, axes))
    known: dict[Conflict, tuple[int, int]] = {}  # (bytes, count)
    for (count, local), (program, completed) in zip(compiled.units, compiled.wholes, strict=True):
        costs = _costs(local, calls)
        for value, found in _of_unit(program, completed):
            key = (value, found.axis, found.phase, found.module, found.source)
            size, number = known.get(found, (0, 0))
            known[found] = (size + costs.pop(key, 0), number + count)
    told = (replace(found, bytes=size, count=number) for found, (size, number) in known.items())
    return tuple(sorted(told, key=lambda found: -found.bytes))


_Key = tuple[int, str, str, str, str]


def _costs(local: Local, calls: Sequence[Sent]) -> dict[_Key, int]:
    """Bytes moved per step of a value for a reader: (value, axis, phase, module, line)."""
    found: dict[_Key, int] = {}
    for call in calls:
        if call.program is local.program:
            op, row = call.op, call.row
            key = (local.origin[op.results[0]][0], row.axis, op.phase, op.module, op.source)
            found[key] = found.get(key, 0) + row.bytes
    return found


def _of_unit(program: Program, completed: Completed) -> Iterator[tuple[int, Conflict]]:
    """(the value that loses, the conflict, its cost still to be found)."""
    for number, op in enumerate(program.ops):
        for axis, best in completed.carried[number]:
            rule, places = completed.rules[number], completed.places.get(axis, {})
            lies = [places.get(value) for value in op.inputs]
            wants = [
                carry_of(rule, dims, place) if isinstance(place, Shard) else None
                for dims, place in zip(rule.operands, lies, strict=True)
            ]
            for operand, want in enumerate(wants):
                if want in (None, best) or op.inputs[operand] in completed.resting:
                    continue
                yield op.inputs[operand], _conflict(program, op, rule, axis, best, wants, operand)


def _conflict(
    program: Program,
    op: Op,
    rule: Rule,
    axis: str,
    best: Carry,
    wants: Sequence[Carry | None],
    operand: int,
) -> Conflict:
    loser, won = wants[operand], wants.index(best) if best in wants else None
    assert loser is not None
    shown = {
        "winner": (rule.results[0] if won is None else rule.operands[won], best),
        "loser": (rule.operands[operand], loser),
        "wanted": (rule.operands[operand], best),
    }
    text: Mapping[str, str] = {
        name: _text(axis, shard_of(rule, dims, carry)) for name, (dims, carry) in shown.items()
    }
    return Conflict(
        op="::".join(op.base.split(".", 1)),
        axis=axis,
        source=op.source,
        module=op.module,
        phase=op.phase,
        winner=f"{'its result' if won is None else f'operand {won}'} {text['winner']}",
        loser=f"operand {operand} {text['loser']}",
        loser_bytes=program.values[op.inputs[operand]].bytes,
        wanted=text["wanted"],
        bytes=0,
        count=0,
    )


def _text(axis: str, shard: Shard | None) -> str:
    return str(Layout() if shard is None else Layout(((axis, shard),)))
