"""Fallbacks: ops without a rule, whose operands every rank gathers to compute them whole.

Always right, never silent: each is told with its line and what it gathers, and one that gathers
more than a plan allows is refused.
"""

from __future__ import annotations

import string
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from meshwright.errors import PlanError
from meshwright.plan.mesh import Axis
from meshwright.plan.size import bytes_text
from meshwright.program.assemble import Compiled
from meshwright.program.explain import moved
from meshwright.program.partition import Local
from meshwright.program.program import ITEMSIZE, Op, Program
from meshwright.program.propagate import Completed

__all__ = ["Fallback", "fallbacks", "require_small"]

_LETTERS = string.ascii_lowercase.replace("n", "")


@dataclass(frozen=True, slots=True)
class Fallback:
    """One op of the user's code that no rule knows.

    Attributes:
        op: as torch names it, `mylib::scan`.
        source: the user's line.
        module: path of the module.
        phase: forward or backward.
        count: times per step.
        bytes: that a rank receives per step so that it has the op's operands whole.
        remedy: a rule that would let it run on shards, if its first dim counts samples.
    """

    op: str
    source: str
    module: str
    phase: str
    count: int
    bytes: int
    remedy: str

    def as_json(self) -> dict[str, Any]:
        """As a mapping."""
        return asdict(self)


def fallbacks(compiled: Compiled, axes: Sequence[Axis]) -> tuple[Fallback, ...]:
    """The ops of a step without a rule, largest first."""
    sizes = {axis.name: axis.size for axis in axes}
    known: dict[tuple[str, ...], Fallback] = {}
    for (count, local), (program, completed) in zip(compiled.units, compiled.wholes, strict=True):
        for found in _of_unit(local, program, completed, sizes):
            key = (found.op, found.source, found.module, found.phase)
            old = known.get(key, replace(found, count=0, bytes=0))
            size = old.bytes + count * found.bytes
            known[key] = replace(found, count=old.count + count, bytes=size)
    return tuple(sorted(known.values(), key=lambda found: -found.bytes))


def _of_unit(
    local: Local, program: Program, completed: Completed, sizes: Mapping[str, int]
) -> Iterator[Fallback]:
    unknown = {
        op.results: op
        for op, rule in zip(program.ops, completed.rules, strict=True)
        if not rule.known
    }
    if not unknown:
        return
    part, makers = local.program, local.program.producers()
    for op in part.ops:
        whole = unknown.get(tuple(local.origin[value][0] for value in op.results))
        if whole is None or op.name != whole.name:
            continue
        gathered = {step for value in op.inputs for step in _brought(part, makers, value)}
        size = sum(_bytes(part.ops[step], part, sizes) for step in gathered)
        name = "::".join(op.base.split(".", 1))
        yield Fallback(name, op.source, op.module, op.phase, 1, size, _remedy(name, whole, program))


def _brought(program: Program, makers: Mapping[int, int], value: int) -> Iterator[int]:
    """The moves that end in a value."""
    while (maker := makers.get(value)) is not None and program.ops[maker].name.startswith("comm."):
        yield maker
        value = program.ops[maker].inputs[0]


def _bytes(op: Op, program: Program, sizes: Mapping[str, int]) -> int:
    if op.name in ("comm.slice", "comm.mask"):
        return 0
    axis = op.args[1]
    assert isinstance(axis, str)
    return moved(op, program, sizes[axis]) * ITEMSIZE[program.values[op.results[0]].dtype]


def _remedy(name: str, op: Op, program: Program) -> str:
    """A rule to begin with: dims of one size are one letter, and only the first may be split."""
    shapes = [program.values[value].shape for value in (*op.inputs, *op.results)]
    samples = next((shape[0] for shape in shapes if shape and shape[0] > 1), 0)
    letters: dict[int, str] = {}

    def letter(dim: int, size: int) -> str:
        if size == 1:
            return "1"
        if dim == 0 and size == samples:
            return "n"
        return letters.setdefault(size, _LETTERS[len(letters) % len(_LETTERS)])

    spelled = [" ".join(letter(dim, size) for dim, size in enumerate(shape)) for shape in shapes]
    count = len(op.inputs)
    pattern = f"{', '.join(spelled[:count])} -> {', '.join(spelled[count:])}"
    whole = f', whole="{" ".join(letters.values())}"' if letters else ""
    return f'mw.rule("{name}", "{pattern}"{whole})'


def require_small(compiled: Compiled, axes: Sequence[Axis], limit: int) -> None:
    """Return if no op without a rule gathers more than `limit` bytes a step.

    Raises:
        PlanError: naming the op, its line, what it would gather, and the remedies.
    """
    large = [found for found in fallbacks(compiled, axes) if found.bytes > limit]
    if not large:
        return
    worst = large[0]
    where = " in ".join(word for word in (worst.source or "the loss", worst.module) if word)
    others = f" (and {len(large) - 1} more ops like it)" if len(large) > 1 else ""
    raise PlanError(
        f"{worst.op} at {where} has no rule, so every rank would gather its operands whole: "
        f"{bytes_text(worst.bytes)} a step, and the plan allows "
        f"{bytes_text(limit)}{others}; declare how its dims hang together, as in "
        f"{worst.remedy} if its first dim counts samples, or allow it with "
        f"max_fallback={-(-worst.bytes // 2**20)} in the plan"
    )
