"""Counter-based random draws: the same numbers under every plan, micro-batching and recomputation.

Every random op draws from Philox 4x64 (Salmon et al. 2011) keyed by (seed, n-th random op) and
counted by the global position of the sample, so that a rank draws for its own samples only. A
sample owns a run of counters as long as its share of the op, so the samples of a rank are drawn in
one go. Where an op has no sample dim, the counter is (step, micro-batch).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = [
    "SampleDim",
    "draw",
    "draw_op",
    "fill",
    "fill_op",
    "keep",
    "later",
    "philox",
    "position_operand",
    "scrambled",
]

SampleDim = tuple[int, int, int]
"""(dim, outer, unit): the dim that counts samples, seen as (outer, samples, unit)."""

_Array = np.ndarray[Any, Any]
_BLOCK_BYTES = 32  # of one Philox counter: four 64-bit words
_BYTES = {"uniform": 4, "integers": 8, "keep": 1}
"""Random bytes that a number takes, by kind. A normal number takes as many as it needs."""


def position_operand(seed: int, first: int, step: int, microbatch: int) -> Tensor:
    """Where a program stands: int64 (seed, first sample, step, micro-batch, draws before)."""
    return torch.tensor([seed, first, step, microbatch, 0], dtype=torch.int64)


def later(position: Tensor, draws: int) -> Tensor:
    """The operand for code whose n-th random op is the forward's n + `draws`."""
    found = position.clone()
    found[4] += draws
    return found


def keep(p: float, dtype: torch.dtype) -> str:
    """The kind of draw that is 1 with probability `p` and else 0, in `dtype`: a dropout mask."""
    return f"keep {p!r} {str(dtype).removeprefix('torch.')}"


@lru_cache(maxsize=256)
def _kind(text: str) -> tuple[str, float, torch.dtype]:
    """Kind, probability and dtype of what a kind's text makes."""
    kind, *rest = text.split()
    if kind == "keep":
        dtype = getattr(torch, rest[1])
        assert isinstance(dtype, torch.dtype)
        return kind, float(rest[0]), dtype
    return kind, 1.0, torch.int64 if kind == "integers" else torch.float32


def philox(seed: int, n: int, counter: Sequence[int]) -> np.random.Generator:
    """The generator of stream (seed, n) at `counter` (two words above the block counter)."""
    return _philox(seed, n, (0, 0, *counter))


def _philox(seed: int, n: int, counter: Sequence[int]) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=_words(seed, n), counter=_words(*counter)))


def _words(*numbers: int) -> _Array:
    """64-bit words; as a plain list numpy would round those past 2^63 to floats."""
    return np.array([int(number) & (2**64 - 1) for number in numbers], dtype=np.uint64)


def draw(
    kind: str,
    size: Sequence[int],
    n: int,
    sample: SampleDim | None,
    start: int,
    position: Tensor,
) -> Tensor:
    """Numbers for the n-th random op.

    Args:
        kind: `uniform` in [0, 1) or `normal`, float32; `integers` in [0, 2^63), int64; or `keep`.
        size: shape of the result (local, where the samples are sharded).
        n: number of the random op in the forward, or in its layer (then `position` says the rest).
        sample: which dim counts samples; None draws one block keyed by (step, micro-batch).
        start: first sample of this rank within the micro-batch.
        position: `position_operand`.
    """
    seed, first, step, microbatch, before = position.tolist()
    n += before
    if sample is None:
        place = _Counters((0, 0, step, 2**32 + microbatch), (0, 0, step, 2**33 + microbatch))
        return _rows(kind, seed, n, place, (1, prod(size))).reshape(tuple(size))
    dim, outer, unit = sample
    rest = (*size[:dim], outer, unit, *size[dim + 1 :])
    shape = size[dim] // (outer * unit), prod(rest)
    rows = _samples(kind, seed, n, first + start, shape).reshape(-1, *rest)
    return rows.movedim(0, dim + 1).reshape(tuple(size))  # ..., outer, samples, unit, ...


def _samples(text: str, seed: int, n: int, first: int, shape: tuple[int, int]) -> Tensor:
    """(samples, numbers of each), from sample `first` on."""
    kind = _kind(text)[0]
    samples, count = shape
    if kind == "normal":  # takes an unknown number of counters: each sample has a range of its own
        block = np.empty(shape, np.float32)
        for k in range(samples):
            philox(seed, n, (first + k, 0)).standard_normal(dtype=np.float32, out=block[k])
        return torch.from_numpy(block)
    each = -(-count * _BYTES[kind] // _BLOCK_BYTES)
    begin = first * each
    # A share's length is in the counter too, so that shares of two lengths never overlap.
    place = _Counters((begin, begin >> 64, count, 1), (0, 0, count, 2), first * count)
    return _rows(text, seed, n, place, shape)


@dataclass(frozen=True, slots=True)
class _Counters:
    """Where the first row begins: its counter, that of what decides ties, its first number."""

    first: tuple[int, int, int, int]
    ties: tuple[int, int, int, int]
    number: int = 0


def _rows(text: str, seed: int, n: int, place: _Counters, shape: tuple[int, int]) -> Tensor:
    """Rows of numbers, each from whole counters."""
    kind, p, dtype = _kind(text)
    samples, count = shape
    generator = _philox(seed, n, place.first)
    if kind == "normal":
        return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
    per_block = _BLOCK_BYTES // _BYTES[kind]
    padded = -(-count // per_block) * per_block
    if kind == "uniform":
        return torch.from_numpy(generator.random((samples, padded), np.float32)[:, :count])
    words = generator.bit_generator.random_raw(samples * padded * _BYTES[kind] // 8)
    if kind == "integers":
        words >>= np.uint64(1)
        return torch.from_numpy(words.view(np.int64).reshape(samples, padded)[:, :count])
    chances = words.view(np.uint8).reshape(samples, padded)[:, :count]
    return _as_mask(_kept(chances, p, _philox(seed, n, place.ties), place.number), dtype)


def _kept(chances: _Array, p: float, secret: np.random.Generator, number: int) -> _Array:
    """Which random bytes are below `p`; where byte and `p` agree so far, further bits decide.

    Those are SplitMix64's (Steele et al. 2014) at the number's own place, exact to 2^-53.
    """
    byte, rest = divmod(p * 256, 1.0)
    if byte >= 256:
        return np.ones(chances.shape, bool)
    kept = chances < np.uint8(byte)
    if rest:
        ties = np.flatnonzero(chances == np.uint8(byte))
        words = (ties.astype(np.uint64) + _words(number)) * _WEYL
        words += secret.bit_generator.random_raw(1)
        kept.reshape(-1)[ties] = _mixed(words) < np.uint64(rest * 2.0**53)
    return kept


_WEYL = np.uint64(0x9E3779B97F4A7C15)


def _mixed(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser; the upper 53 bits."""
    return _final(words) >> np.uint64(11)


def _final(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    found: npt.NDArray[np.uint64] = words ^ (words >> np.uint64(31))
    return found


def scrambled(places: npt.NDArray[np.uint64], secret: int) -> npt.NDArray[np.uint64]:
    """64 random bits for each place: SplitMix64's stream that begins at `secret`, read there."""
    words = np.atleast_1d(places) + np.uint64(1)  # numpy warns of single numbers that wrap around
    words *= _WEYL
    words += np.uint64(secret)
    return _final(words).reshape(places.shape)


_ONE = {torch.bfloat16: 0x3F80, torch.float16: 0x3C00}
"""1.0 as bits, for dtypes that numpy lacks or is slow at."""


def _as_mask(kept: _Array, dtype: torch.dtype) -> Tensor:
    """0 and 1 of `dtype`; numpy widens bytes in half of the time that torch takes."""
    if dtype in _ONE:
        return torch.from_numpy(np.multiply(kept, np.uint16(_ONE[dtype]))).view(dtype)
    if dtype in (torch.float32, torch.float64):
        return torch.from_numpy(kept.astype(str(dtype).removeprefix("torch.")))
    return torch.from_numpy(kept).to(dtype)


@torch.library.custom_op("meshwright::draw", mutates_args=())
def draw_op(
    kind: str,
    size: Sequence[int],
    n: int,
    dim: int,
    outer: int,
    unit: int,
    start: int,
    position: Tensor,
) -> Tensor:
    """`draw` as an op that can be traced; `dim` -1 where no sample dim is known."""
    made = draw(kind, size, n, (dim, outer, unit) if dim >= 0 else None, start, position)
    return made.contiguous()  # as the stand-in below is


@draw_op.register_fake
def _(
    kind: str,
    size: Sequence[int],
    n: int,
    dim: int,
    outer: int,
    unit: int,
    start: int,
    position: Tensor,
) -> Tensor:
    del n, dim, outer, unit, start
    return position.new_empty(size, dtype=_kind(kind)[2])


_BLOCK = 2**16
"""Elements that `fill` draws at a time."""


def fill(x: Tensor, kind: str, n: int, scale: float, shift: float, position: Tensor) -> Tensor:
    """Write the n-th draw into `x` block by block, times `scale` plus `shift`; returns `x`.

    The numbers are those of `draw` without samples; beside `x` only a block is in memory.
    """
    seed, _, step, microbatch, before = position.tolist()
    n += before
    generator = philox(seed, n, (step, 2**32 + microbatch))
    whole = x if x.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format)
    flat = whole.view(-1)
    for start in range(0, flat.numel(), _BLOCK):
        block = np.empty(min(_BLOCK, flat.numel() - start), np.float32)
        if kind == "normal":
            generator.standard_normal(dtype=np.float32, out=block)
        else:
            generator.random(dtype=np.float32, out=block)
        flat[start : start + len(block)].copy_(torch.from_numpy(block).mul_(scale).add_(shift))
    return x if whole is x else x.copy_(whole)


@torch.library.custom_op("meshwright::fill", mutates_args=("x",))
def fill_op(x: Tensor, kind: str, n: int, scale: float, shift: float, position: Tensor) -> None:
    """`fill` as an op that can be recorded."""
    fill(x, kind, n, scale, shift, position)


@fill_op.register_fake
def _(x: Tensor, kind: str, n: int, scale: float, shift: float, position: Tensor) -> None:
    del x, kind, n, scale, shift, position
