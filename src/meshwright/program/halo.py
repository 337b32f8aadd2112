"""Halos: windows over a dim that is split read the edges of what other ranks hold.

A rank that makes some rows of a convolution's output reads the rows that their windows cover: its
own, and a few of its neighbours'. They are exchanged (GSPMD, Xu et al. 2021, section 4.3), what
lies beyond the whole tensor is padded, and the op runs with no padding of its own. Its gradient
goes the way back, and rows that several ranks read are added up.

    rows held      0 1 2 3 | 4 5 6 7        rows read by windows of 3:    - 0 1 2 3 4 | 3 4 5 6 7 -
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from meshwright.program.layout import chunk
from meshwright.program.program import Arg, Op, Ref, Value, map_refs
from meshwright.program.rules.factor import Halo

__all__ = ["Spans", "Spreader", "spans"]

_Span = tuple[int, int]
"""(start, stop)."""


@dataclass(frozen=True, slots=True)
class Spans:
    """Rows of a split dim, per coordinate along the axis.

    Attributes:
        held: what lies there.
        read: what its windows cover of the tensor.
        beyond: how many rows they cover before its begin, and behind its end.
    """

    held: tuple[_Span, ...]
    read: tuple[_Span, ...]
    beyond: tuple[tuple[int, int], ...]

    def shared(self, holder: int, reader: int) -> _Span:
        """Of what `holder` holds, what `reader` reads; (n, n) where it is nothing."""
        start = max(self.held[holder][0], self.read[reader][0])
        stop = min(self.held[holder][1], self.read[reader][1])
        return (start, max(start, stop))


def spans(halo: Halo, rows: int, made: int, parts: int) -> Spans:
    """The spans where `rows` rows, of which windows make `made`, are split in `parts`."""
    held, read, beyond = [], [], []
    for part in range(parts):
        start, length = chunk(rows, parts, part)
        held.append((start, start + length))
        first, count = chunk(made, parts, part)
        begin = first * halo.stride - halo.padding
        end = (first + count - 1) * halo.stride - halo.padding + halo.reach
        low = min(max(begin, 0), rows)
        high = max(low, min(end, rows))
        read.append((low, high))
        beyond.append((low - begin, end - high))
    return Spans(tuple(held), tuple(read), tuple(beyond))


@dataclass(slots=True)
class Spreader:
    """Writes one op over a dim that an axis splits.

    Attributes:
        halo: of the op.
        axis: that splits the dim.
        member: the rank's coordinate along it.
        rows: of all ranks.
        values: of the local program; new ones come from `scratch`.
        scratch: a local value of a dtype and shape that is a part of no global one.
        known: what was read before, by (value, rows, dim, fill): a backward op reads it again.
    """

    halo: Halo
    axis: str
    member: int
    rows: Spans
    values: Sequence[Value]
    scratch: Callable[[Value], int]
    known: dict[tuple[int, Spans, int, float], int]

    def write(self, op: Op) -> list[Op]:
        """The ops in place of a local one."""
        halo = self.halo
        x = op.inputs[halo.operand]
        made, read = self._read(op, x)
        operands = list(op.inputs)
        operands[halo.operand] = read
        if halo.positions is not None and halo.gradient is not None:
            operands[halo.positions], shift = self._shifted(op, operands[halo.positions], -1)
            made.append(shift)
        feed = iter(operands)
        args: tuple[Arg, ...] = map_refs(op.args, lambda _: next(feed))
        op = replace(op, args=self._unpadded(args))
        if halo.gradient is not None and op.outputs[halo.gradient] is not None:
            return [*made, *self._gradient(op, x, read)]
        if halo.positions is not None and op.outputs[halo.positions] is not None:
            return [*made, *self._positioned(op)]
        return [*made, op]

    def _unpadded(self, args: tuple[Arg, ...]) -> tuple[Arg, ...]:
        """Arguments with no padding of the dim; left out, there is none."""
        place, dim = self.halo.place, self.halo.dim - 2
        if len(args) <= place:
            return args
        padding = args[place]
        assert isinstance(padding, tuple)
        return (*args[:place], (*padding[:dim], 0, *padding[dim + 1 :]), *args[place + 1 :])

    def _sized(self, value: int, size: int) -> Value:
        shape, dim = self.values[value].shape, self.halo.dim
        return Value(self.values[value].dtype, (*shape[:dim], size, *shape[dim + 1 :]))

    def _read(self, op: Op, x: int) -> tuple[list[Op], int]:
        """Fetch the rows that windows cover, and pad where they cover none."""
        key = (x, self.rows, self.halo.dim, self.halo.fill)
        if key in self.known:
            return [], self.known[key]
        low, high = self.rows.read[self.member]
        fetched = self.known[key] = self.scratch(self._sized(x, high - low))
        ops = [self._exchange(op, x, fetched, gives=False)]
        before, after = self.rows.beyond[self.member]
        if not self._pads:
            return ops, fetched
        padded = self.known[key] = self.scratch(self._sized(x, before + high - low + after))
        ops.append(self._padded(op, fetched, padded, (before, after), self.halo.fill))
        return ops, padded

    def _exchange(self, op: Op, value: int, result: int, *, gives: bool) -> Op:
        """Rows held go to those who read them; `gives`: rows read go to those who hold them."""
        count, me, rows = len(self.rows.held), self.member, self.rows
        out = [rows.shared(k, me) if gives else rows.shared(me, k) for k in range(count)]
        into = [rows.shared(me, k) if gives else rows.shared(k, me) for k in range(count)]
        origin = (rows.read if gives else rows.held)[me][0]
        starts = tuple(start - origin if stop > start else 0 for start, stop in out)
        lengths = tuple(stop - start for start, stop in out)
        dim = self.halo.dim
        received = (dim, 1, 1, (0,) * count, tuple(stop - start for start, stop in into))
        args: tuple[Arg, ...] = (Ref(value), self.axis, received, (dim, 1, 1, starts, lengths))
        words = ("with halo", "sharded")[gives], ("sharded", "with halo")[gives]
        shape, most = self.values[value].shape, max(high - low for low, high in rows.read)
        row = math.prod(shape[:dim]) * math.prod(shape[dim + 1 :])
        sized = (("load", most * row), ("sent", (sum(lengths) - lengths[me]) * row))
        notes = (("before", words[1]), ("after", words[0]), ("value", ""), *sized)
        return _beside(op, "comm.all_to_all", args, (result,), notes)

    def _padded(self, op: Op, value: int, result: int, ends: tuple[int, int], fill: float) -> Op:
        behind = len(self.values[value].shape) - 1 - self.halo.dim
        args: tuple[Arg, ...] = (Ref(value), (*(0, 0) * behind, *ends), fill)
        return _beside(op, "aten.constant_pad_nd.default", args, (result,))

    def _gradient(self, op: Op, x: int, read: int) -> list[Op]:
        """The op, whose gradient of the rows read is brought to the rows held."""
        place = self.halo.gradient
        assert place is not None
        wanted = op.outputs[place]
        assert wanted is not None
        wide = self.scratch(self.values[read])
        ops = [replace(op, outputs=(*op.outputs[:place], wide, *op.outputs[place + 1 :]))]
        if self._pads:
            low, high = self.rows.read[self.member]
            before, after = self.rows.beyond[self.member]
            inner = self.scratch(self._sized(x, high - low))
            ops.append(self._padded(op, wide, inner, (-before, -after), 0.0))
            wide = inner
        start, stop = self.rows.held[self.member]
        shared = [self.rows.shared(self.member, k) for k in range(len(self.rows.held))]
        joined = self.scratch(self._sized(x, sum(b - a for a, b in shared)))
        ops.append(self._exchange(op, wide, joined, gives=True))
        starts = tuple(a - start if b > a else 0 for a, b in shared)
        lengths = tuple(b - a for a, b in shared)
        args: tuple[Arg, ...] = (Ref(joined), self.halo.dim, stop - start, starts, lengths)
        ops.append(_beside(op, "meshwright.overlap_add.default", args, (wanted,)))
        return ops

    @property
    def _pads(self) -> bool:
        """Whether any rank pads; all then write the same ops."""
        return any(any(ends) for ends in self.rows.beyond)

    def _positioned(self, op: Op) -> list[Op]:
        """The op, whose positions count from the whole tensor's first element."""
        place = self.halo.positions
        assert place is not None
        wanted = op.outputs[place]
        assert wanted is not None
        local = self.scratch(self.values[wanted])
        outputs = (*op.outputs[:place], local, *op.outputs[place + 1 :])
        shift = _beside(op, "aten.add.Scalar", (Ref(local), self._offset), (wanted,))
        return [replace(op, outputs=outputs), shift]

    def _shifted(self, op: Op, positions: int, sign: int) -> tuple[int, Op]:
        local = self.scratch(self.values[positions])
        args: tuple[Arg, ...] = (Ref(positions), sign * self._offset)
        return local, _beside(op, "aten.add.Scalar", args, (local,))

    @property
    def _offset(self) -> int:
        """Elements of a plane before the rank's first row, padded ones counted too."""
        rows = self.rows.read[self.member][0] - self.rows.beyond[self.member][0]
        return rows * self.halo.width


def _beside(
    op: Op,
    name: str,
    args: tuple[Arg, ...],
    outputs: tuple[int, ...],
    notes: tuple[tuple[str, Arg], ...] = (),
) -> Op:
    """An op written for another, which says where it comes from."""
    return replace(op, name=name, args=args, kwargs=notes, outputs=outputs, packed=False)
