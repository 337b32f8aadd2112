"""Ring attention: keys and values go around, a block at a time (Liu, Zaharia, Abbeel 2023).

    forward    hop k v | own block | hop k v | block of the rank before | .. | the last block
    backward   k v go around again; the gradient of a block travels with it, comes home after N - 1
               hops, and takes there what its own rank's queries owe it

All ranks write the same ops, so that their hops fall into the same buckets; a block that a rank's
queries may not see yet is a step that `sees` none and computes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from meshwright.program.layout import chunk
from meshwright.program.program import Arg, Op, Ref, Value

__all__ = ["Ring"]

_SEQUENCE = 2
_SHORT = ("bfloat16", "float16")


@dataclass(slots=True)
class Ring:
    """Writes one attention as a ring.

    Attributes:
        axis: that splits sequences.
        member: the rank's coordinate along it.
        parts: ranks along it.
        keys: of the whole sequence.
        values: of the local program; new ones come from `scratch`.
        scratch: a local value of a dtype and shape that is a part of no global one.
        ops: what was written.
    """

    axis: str
    member: int
    parts: int
    keys: int
    values: Sequence[Value]
    scratch: Callable[[Value], int]
    ops: list[Op] = field(default_factory=list)

    def write(self, op: Op) -> Sequence[Op]:
        """The ops in place of a local one."""
        if op.base.endswith("_backward"):
            self._backward(op)
        else:
            self._forward(op)
        return self.ops

    def _forward(self, op: Op) -> None:
        query, *held = op.inputs[:3]
        causal, before = op.args[4:5] == (True,), 0
        out: tuple[int | None, ...] = (None, None)
        for step in range(self.parts):
            last, block = step == self.parts - 1, (self.member - step) % self.parts
            upcoming = held if last else self._hop(op, held, step)
            made = op.outputs if last else self._wide(op)
            args = (
                *map(Ref, (query, *held)), *map(_ref, out), self._sees(block, causal=causal),
                self._block(block)[0], before, last, *_settings(op),
            )  # fmt: skip
            self._step(op, "ring_step", args, made)
            out, held, before = made, upcoming, before + self._block(block)[1]

    def _backward(self, op: Op) -> None:
        gradient, query, *held = op.inputs[:4]
        own, causal = list(held), op.args[7] is True
        sums: tuple[int | None, ...] = (None, None, None)
        held = self._hop(op, held, 0)
        for step in range(1, self.parts + 1):
            home, block = step == self.parts, (self.member - step) % self.parts
            upcoming = self._hop(op, held, step) if step < self.parts - 1 else held
            blocks = own if home else held
            made = op.outputs if home else self._sums(op, query, blocks)
            args = (
                *map(Ref, (gradient, query, *blocks, *op.inputs[4:6])), *map(_ref, sums),
                self._sees(block, causal=causal), self._block(block)[0], home, *_settings(op),
            )  # fmt: skip
            self._step(op, "ring_step_backward", args, made)
            if not home:
                travels = [value for value in made[1:] if value is not None]
                sums = (made[0], *self._hop(op, travels, step))
            held = upcoming

    def _block(self, member: int) -> tuple[int, int]:
        """(start, length) of a member's keys."""
        return chunk(self.keys, self.parts, member)

    def _sees(self, block: int, *, causal: bool) -> str:
        if not causal or block < self.member:
            return "all"
        return "causal" if block == self.member else "none"

    def _wide(self, op: Op) -> tuple[int, ...]:
        """Values like what attention makes, in a dtype to add in."""
        query, value = (self.values[op.inputs[place]] for place in (0, 2))
        rows = query.shape[:-1]
        dtype = _wide(query.dtype)
        shapes = ((*rows, value.shape[-1]), rows)
        return tuple(self.scratch(Value(dtype, shape)) for shape in shapes)

    def _sums(self, op: Op, query: int, block: Sequence[int]) -> tuple[int, ...]:
        del op
        likes = [self.values[value] for value in (query, *block)]
        return tuple(self.scratch(Value(_wide(like.dtype), like.shape)) for like in likes)

    def _hop(self, op: Op, held: Sequence[int], step: int) -> list[int]:
        """Blocks go on to the next rank, which may have a larger or smaller one."""
        blocks = [self._block((member - step) % self.parts) for member in range(self.parts)]
        starts, lengths = zip(*blocks, strict=True)
        came = lengths[(self.member - 1) % self.parts]
        found = []
        for value in held:
            like = self.values[value]
            shape = (*like.shape[:_SEQUENCE], came, *like.shape[_SEQUENCE + 1 :])
            made = self.scratch(Value(like.dtype, shape))
            cut = (_SEQUENCE, 1, 1, starts, lengths)
            load = math.prod(shape) // came * max(lengths)
            notes = (
                ("before", f"one block of the sequence over {self.axis}"),
                ("after", "the block of the rank before"),
                ("value", ""),
                ("load", load),
            )
            args: tuple[Arg, ...] = (Ref(value), self.axis, cut, shape)
            self._add(op, "comm.permute", args, (made,), notes)
            found.append(made)
        return found

    def _step(
        self, op: Op, name: str, args: tuple[Arg, ...], outputs: Sequence[int | None]
    ) -> None:
        self._add(op, f"meshwright.{name}.default", args, tuple(outputs))
        self.ops[-1] = replace(self.ops[-1], packed=True)

    def _add(
        self,
        op: Op,
        name: str,
        args: tuple[Arg, ...],
        outputs: tuple[int | None, ...],
        notes: tuple[tuple[str, Arg], ...] = (),
    ) -> None:
        made = replace(op, name=name, args=args, kwargs=notes, outputs=outputs, packed=False)
        self.ops.append(made)


def _ref(value: int | None) -> Arg:
    return None if value is None else Ref(value)


def _settings(op: Op) -> tuple[Arg, Arg]:
    """The mask and the scale."""
    named = dict(op.kwargs)
    return named.get("attn_mask"), named.get("scale")


def _wide(dtype: str) -> str:
    return "float32" if dtype in _SHORT else dtype
