"""Counter-based random draws: the same numbers under every plan, micro-batching and recomputation.

Every random op draws from Philox (Salmon et al. 2011) keyed by (seed, n-th random op) and counted
by the global position of the sample, so that a rank draws for its own samples only. Where an op has
no sample dim, the counter is (step, micro-batch).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["SampleDim", "draw", "draw_op", "fill", "fill_op", "philox", "position_operand"]

SampleDim = tuple[int, int, int]
"""(dim, outer, unit): the dim that counts samples, seen as (outer, samples, unit)."""


def position_operand(seed: int, first: int, step: int, microbatch: int) -> Tensor:
    """The operand that tells a program where it stands: int64 (seed, first sample, step, k)."""
    return torch.tensor([seed, first, step, microbatch], dtype=torch.int64)


def philox(seed: int, n: int, counter: Sequence[int]) -> np.random.Generator:
    """The generator of stream (seed, n) at `counter` (two words above the block counter)."""
    key, words = _words(seed, n), _words(0, 0, *counter)
    return np.random.Generator(np.random.Philox(key=key, counter=words))


def _words(*numbers: int) -> np.ndarray[Any, Any]:
    """64-bit words; as a plain list numpy would round those past 2^63 to floats."""
    return np.array([int(number) & (2**64 - 1) for number in numbers], dtype=np.uint64)


def _fill(kind: str, generator: np.random.Generator, out: np.ndarray[Any, Any]) -> None:
    if kind == "uniform":
        generator.random(dtype=np.float32, out=out)
    elif kind == "normal":
        generator.standard_normal(dtype=np.float32, out=out)
    else:
        out[...] = generator.integers(0, 2**63 - 1, size=out.shape, dtype=np.int64)


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
        kind: `uniform` in [0, 1) or `normal`, float32; `integers` in [0, 2^63 - 1), int64.
        size: shape of the result (local, where the samples are sharded).
        n: number of the random op in the forward.
        sample: which dim counts samples; None draws one block keyed by (step, micro-batch).
        start: first sample of this rank within the micro-batch.
        position: `position_operand`.
    """
    seed, first, step, microbatch = (int(x) for x in position.tolist())
    dtype = np.int64 if kind == "integers" else np.float32
    if sample is None:
        whole = np.empty(tuple(size), dtype)
        _fill(kind, philox(seed, n, (step, 2**32 + microbatch)), whole)
        return torch.from_numpy(whole)
    dim, outer, unit = sample
    samples = size[dim] // (outer * unit)
    rest = (*size[:dim], outer, unit, *size[dim + 1 :])
    block = np.empty((samples, *rest), dtype)
    for k in range(samples):
        _fill(kind, philox(seed, n, (first + start + k, 0)), block[k])
    placed = np.moveaxis(block, 0, dim + 1)  # ..., outer, samples, unit, ...
    return torch.from_numpy(np.ascontiguousarray(placed)).reshape(tuple(size))


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
    return draw(kind, size, n, (dim, outer, unit) if dim >= 0 else None, start, position)


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
    return position.new_empty(size, dtype=torch.int64 if kind == "integers" else torch.float32)


_BLOCK = 2**16
"""Elements that `fill` draws at a time."""


def fill(x: Tensor, kind: str, n: int, scale: float, shift: float, position: Tensor) -> Tensor:
    """Write the n-th draw into `x` block by block, times `scale` plus `shift`; returns `x`.

    The numbers are those of `draw` without samples; beside `x` only a block is in memory.
    """
    seed, _, step, microbatch = (int(number) for number in position.tolist())
    generator = philox(seed, n, (step, 2**32 + microbatch))
    whole = x if x.is_contiguous() else torch.empty_like(x, memory_format=torch.contiguous_format)
    flat = whole.view(-1)
    for start in range(0, flat.numel(), _BLOCK):
        block = np.empty(min(_BLOCK, flat.numel() - start), np.float32)
        _fill(kind, generator, block)
        flat[start : start + len(block)].copy_(torch.from_numpy(block).mul_(scale).add_(shift))
    return x if whole is x else x.copy_(whole)


@torch.library.custom_op("meshwright::fill", mutates_args=("x",))
def fill_op(x: Tensor, kind: str, n: int, scale: float, shift: float, position: Tensor) -> None:
    """`fill` as an op that can be recorded."""
    fill(x, kind, n, scale, shift, position)


@fill_op.register_fake
def _(x: Tensor, kind: str, n: int, scale: float, shift: float, position: Tensor) -> None:
    del x, kind, n, scale, shift, position
