"""Stochastic rounding: how weights and optimizer state that are kept in bf16 are updated.

The optimizer computes in float32, a few parameters at a time; what it made is rounded up or down
with the chance of its distance, so that the mean over draws is the number itself (Gupta et al.
2015), and updates too small for bf16's 8 bits are not lost. An element's draw is keyed by (seed,
parameter, step) and its place in the whole tensor: every layout rounds alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from meshwright.compile.draw import philox, scrambled
from meshwright.program.layout import Bounds

__all__ = ["BLOCK_ELEMENTS", "CHUNK_ELEMENTS", "Boxes", "Rounding", "rounded"]

Boxes = tuple[tuple[Bounds, Bounds], ...]
"""Where the parts of a rank's tensor lie: in the whole, and in it."""

_STREAM = 2**41
"""Draws of streams of their own, far from those of steps and of initialisation."""

_LANES = 4  # 16-bit draws in a word
CHUNK_ELEMENTS = 2**21
"""Elements that are widened at a time: 8 MiB of each of weights, gradients and slots."""
BLOCK_ELEMENTS = 2**18
"""Elements that are rounded at a time: 64 bits of each are drawn."""


def rounded(x: Tensor, draws: Tensor) -> Tensor:
    """`x`, float32, in bf16: to the neighbour that a draw from [0, 65536) chooses.

    What bf16 can hold stays as it is, infinities and NaN too.
    """
    bits = x.contiguous().view(torch.int32) + draws
    found = (bits >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(x.isfinite(), found, x.to(torch.bfloat16))


@dataclass(frozen=True, slots=True)
class Rounding:
    """What of a rank's state is kept in bf16, and how it is stepped.

    Attributes:
        seed: of the job.
        numbers: of each parameter kept so, its number in the model.
        shapes: whole.
        boxes: of the rank's shards; where one has none, it is the whole.
        together: the optimizer steps all parameters at once, as they depend on each other.
    """

    seed: int
    numbers: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]
    boxes: Mapping[str, Boxes]
    together: bool = False

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        shards: Mapping[str, nn.Parameter],
        gradients: Mapping[str, Tensor],
        factor: float,
        at: int,
    ) -> None:
        """Step the optimizer on all shards that have a gradient.

        Args:
            optimizer: over the shards.
            shards: by name.
            gradients: by name; of what is kept in bf16 not yet times `factor`.
            factor: of those.
            at: the step.
        """
        for chunk in self._chunks([name for name in shards if name in gradients], shards):
            mine = {name: shards[name] for name in chunk}
            with self.wide(optimizer, {n: p for n, p in mine.items() if n in self.numbers}, at):
                for name, shard in mine.items():
                    short = name in self.numbers
                    given = gradients[name]
                    shard.grad = given.to(shard.dtype).mul_(factor) if short else given
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

    def _chunks(
        self, names: Sequence[str], shards: Mapping[str, nn.Parameter]
    ) -> Iterator[Sequence[str]]:
        """What is stepped at once, what is not kept in bf16 first; one at least, if of nothing."""
        chunk = list(names) if self.together else [n for n in names if n not in self.numbers]
        size = 0
        for name in () if self.together else names:
            if name not in self.numbers:
                continue
            if size and size + shards[name].numel() > CHUNK_ELEMENTS:
                yield chunk
                chunk, size = [], 0
            chunk.append(name)
            size += shards[name].numel()
        yield chunk

    @contextmanager
    def wide(
        self, optimizer: torch.optim.Optimizer, shards: Mapping[str, nn.Parameter], at: int
    ) -> Iterator[None]:
        """Within, these and their optimizer state are float32; then they are rounded, step `at`."""
        kept = {name: shard.data for name, shard in shards.items()}
        for shard in shards.values():
            shard.grad = None
            shard.data = shard.data.float()
            slots = optimizer.state.get(shard, {})
            slots |= {k: v.float() for k, v in slots.items() if _follows(v, shard, torch.bfloat16)}
        yield
        for name, shard in shards.items():
            slots = optimizer.state.get(shard, {})
            moved = {k: v for k, v in slots.items() if _follows(v, shard, torch.float32)}
            short = {k: torch.empty_like(v, dtype=torch.bfloat16) for k, v in moved.items()}
            pairs = [(shard.data, kept[name]), *zip(moved.values(), short.values(), strict=True)]
            self._round(name, at, pairs)
            slots |= short
            shard.grad, shard.data = None, kept[name]

    def _round(self, name: str, at: int, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Round each first tensor of a shard into the second, block by block of rows."""
        secrets = self._secrets(name, at, len(pairs))
        whole = self.shapes[name] or (1,)
        boxes = self.boxes.get(name) if self.shapes[name] else None
        pairs = [(w.view(1), s.view(1)) if not w.dim() else (w, s) for w, s in pairs]
        for rows in _blocks(tuple(pairs[0][0].shape)):
            place = _places(whole, boxes or (_all_of(whole),), rows)
            for (wide, short), drawn in zip(pairs, _draws(place, secrets), strict=False):
                short[rows].copy_(rounded(wide[rows], drawn))

    def _secrets(self, name: str, at: int, count: int) -> list[int]:
        """What the draws of step `at` for `count` tensors of a shard's shape begin with."""
        source = philox(self.seed, _STREAM + self.numbers[name], (at, 0)).bit_generator
        return [int(source.random_raw()) for _ in range(0, count, _LANES)]


def _draws(place: npt.NDArray[np.uint64], secrets: Iterable[int]) -> Iterator[Tensor]:
    """Numbers from [0, 65536) for each place, tensor by tensor: four of each secret."""
    for secret in secrets:
        words = scrambled(place, secret)
        for lane in range(_LANES):
            drawn = (words >> np.uint64(16 * lane)) & np.uint64(0xFFFF)
            yield torch.from_numpy(np.asarray(drawn, np.int32))


def _follows(value: Any, shard: Tensor, dtype: torch.dtype) -> bool:
    """Whether a value of an optimizer's state is one number of this dtype per element."""
    if not isinstance(value, Tensor) or not value.dim():
        return False
    return value.shape == shard.shape and value.dtype == dtype


def _all_of(shape: tuple[int, ...]) -> tuple[Bounds, Bounds]:
    """The box of a tensor that a rank has all of."""
    bounds = tuple((0, size) for size in shape)
    return bounds, bounds


def _blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Rows that are rounded at once: one of them at least."""
    if all(shape):
        rows = max(1, BLOCK_ELEMENTS // prod(shape[1:]))
        yield from (slice(at, min(at + rows, shape[0])) for at in range(0, shape[0], rows))


def _places(shape: tuple[int, ...], boxes: Boxes, rows: slice) -> npt.NDArray[np.uint64]:
    """The place of each element, in some rows of a rank's part, in the whole tensor of `shape`."""
    inner = (max(here[dim][0] + here[dim][1] for _, here in boxes) for dim in range(1, len(shape)))
    found = np.zeros((rows.stop - rows.start, *inner), np.uint64)
    for there, here in boxes:
        (start, length), *others = here
        first, last = max(start, rows.start), min(start + length, rows.stop)
        if first < last:
            where = slice(first - rows.start, last - rows.start)
            bounds = ((there[0][0] + first - start, last - first), *there[1:])
            found[(where, *(slice(at, at + size) for at, size in others))] = _box(shape, bounds)
    return found


def _box(shape: tuple[int, ...], bounds: Bounds) -> npt.NDArray[np.uint64]:
    found = np.zeros((), np.uint64)
    for size, (start, length) in zip(shape, bounds, strict=True):
        inner = np.arange(start, start + length, dtype=np.uint64)
        found = found[..., None] * np.uint64(size) + inner
    return found
