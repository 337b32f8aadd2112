"""Several tensors as one stream of bytes, end to end, which goes through slots a piece at a time.

A bucket is never made flat first: bytes go straight from each tensor into a slot, and straight from
a slot into each answer.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import final

import torch
from torch import Tensor

__all__ = ["Cargo", "move", "views"]

move = ctypes.memmove
"""`move(to, source, count)` copies bytes between addresses, without holding the interpreter."""


@final
class Cargo:
    """Dense tensors of one dtype, by address; `size` in bytes."""

    __slots__ = ("_addresses", "_ends", "_scratch", "_tensors", "size")

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """At least one tensor."""
        self._tensors = tensors
        self._addresses = [tensor.data_ptr() for tensor in tensors]
        self._ends = list(itertools.accumulate([tensor.nbytes for tensor in tensors]))
        self.size = self._ends[-1]
        self._scratch: Tensor | None = None

    def load(self, slot: int, start: int, stop: int) -> None:
        """Copy bytes `start` to `stop` of the stream to the address `slot`."""
        if len(self._ends) == 1:
            move(slot, self._addresses[0] + start, max(stop - start, 0))
            return
        for address, place, count in self._segments(start, stop):
            move(slot + place, address, count)

    def unload(self, slot: int, start: int, stop: int) -> None:
        """Copy what is at the address `slot` into bytes `start` to `stop` of the stream."""
        if len(self._ends) == 1:
            move(self._addresses[0] + start, slot, max(stop - start, 0))
            return
        for address, place, count in self._segments(start, stop):
            move(address, slot + place, count)

    def part(self, start: int, stop: int) -> Tensor:
        """Bytes `start` to `stop` as a flat tensor to read; it holds until the next call.

        It is the memory itself where that is in one piece, else a copy.
        """
        k = bisect_right(self._ends, start) if start < self.size else len(self._ends) - 1
        tensor = self._tensors[k]
        size = tensor.dtype.itemsize
        if stop <= self._ends[k]:
            first = self._ends[k] - tensor.nbytes
            return tensor.view(-1)[(start - first) // size : (stop - first) // size]
        if self._scratch is None or self._scratch.nbytes < stop - start:
            self._scratch = torch.empty((stop - start) // size, dtype=tensor.dtype)
        self.load(self._scratch.data_ptr(), start, stop)
        return self._scratch[: (stop - start) // size]

    def put(self, part: Tensor, start: int, stop: int) -> None:
        """Copy a flat tensor into bytes `start` to `stop`, unless it is their memory already."""
        source = part.data_ptr()
        if source != self._address(start):
            self.unload(source, start, stop)

    def _address(self, start: int) -> int:
        k = bisect_right(self._ends, start) if start < self.size else len(self._ends) - 1
        return self._addresses[k] + start - (self._ends[k - 1] if k else 0)

    def _segments(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(address, how far from `start`, bytes) of each piece of memory."""
        ends, low = self._ends, start
        for k in range(bisect_right(ends, start), len(ends)):
            high = min(ends[k], stop)
            if high > low:
                first = ends[k - 1] if k else 0
                yield self._addresses[k] + low - first, low - start, high - low
                low = high
            if low >= stop:
                return


def views(flat: Tensor, shapes: Sequence[Sequence[int]]) -> tuple[Tensor, ...]:
    """Tensors of these shapes, one after the other in `flat`."""
    parts = flat.split([math.prod(shape) for shape in shapes])
    return tuple([part.view(tuple(shape)) for part, shape in zip(parts, shapes, strict=True)])
