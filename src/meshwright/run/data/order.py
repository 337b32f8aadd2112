"""Which sample each step takes: pure functions of (seed, epoch, position).

The samples of all epochs form one endless sequence of positions. Step `s` takes positions
`[s * batch_size, (s + 1) * batch_size)`, so a batch may straddle two epochs, and neither the number
of ranks, nor micro-batches, nor workers has a say.

Everything is made of Philox's raw 64-bit words (Salmon et al. 2011, "Parallel random numbers: as
easy as 1, 2, 3"), whose values numpy guarantees; those of `Generator.permutation` it does not, and
a run may be resumed under another numpy.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
from numpy.random import Philox

__all__ = ["collate_seed", "indices", "permutation", "sample_seeds", "steps_in"]

# One counter range per use, so that equal keys of two uses never share a word.
_SHUFFLE, _SAMPLE, _COLLATE = 1, 2, 3
_WORD = 2**64


@lru_cache(maxsize=2)  # a batch that straddles an epoch needs two
def permutation(length: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order of `epoch`: each index in `[0, length)` once; int64 [length], read-only."""
    words = _philox(seed, epoch, _SHUFFLE).random_raw(length)
    order = np.argsort(words, kind="stable").astype(np.int64, copy=False)
    order.flags.writeable = False
    return order


def indices(
    start: int, stop: int, *, length: int, seed: int, shuffled: bool = True
) -> npt.NDArray[np.int64]:
    """The dataset's indices at positions `[start, stop)` of the endless sequence.

    Args:
        start: first position, 0 or more.
        stop: one past the last position.
        length: samples per epoch, 1 or more.
        seed: of the job.
        shuffled: without it each epoch is 0, 1, ..., length - 1.

    Returns:
        int64 [stop - start].
    """
    positions = np.arange(start, stop, dtype=np.int64)
    offsets = positions % length
    if not shuffled:
        return offsets
    epochs = positions // length
    found = np.empty_like(positions)
    for epoch in range(start // length, (max(start, stop - 1)) // length + 1):
        mine = epochs == epoch
        found[mine] = permutation(length, seed, epoch)[offsets[mine]]
    return found


def sample_seeds(seed: int, start: int, stop: int) -> list[int]:
    """The 63-bit seeds of the generators when the samples at `[start, stop)` are read.

    A position is a counter, of whose four words the first is taken.
    """
    words = _philox(seed, 0, _SAMPLE, start).random_raw(4 * (stop - start))
    seeds: list[int] = (words[::4] >> np.uint64(1)).tolist()
    return seeds


def collate_seed(seed: int, step: int) -> int:
    """The 63-bit seed of the generators when the batch of `step` is collated."""
    return int(_philox(seed, step, _COLLATE).random_raw()) >> 1


def steps_in(epochs: int, length: int, batch_size: int) -> int:
    """How many steps see every sample `epochs` times; the last may reach into the next epoch."""
    return -(-epochs * length // batch_size)


def _philox(seed: int, key: int, use: int, start: int = 0) -> Philox:
    words = np.array([seed % _WORD, key % _WORD], dtype=np.uint64)
    return Philox(key=words, counter=np.array([start, 0, 0, use], dtype=np.uint64))
