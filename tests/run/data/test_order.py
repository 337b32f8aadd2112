"""The order of samples: a pure function that no world, micro-batching or worker changes."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.run.data import order

lengths = st.integers(1, 60)
seeds = st.integers(0, 2**63 - 1)


def taken(start, stop, length, seed):
    return order.indices(start, stop, length=length, seed=seed).tolist()


@given(lengths, seeds, st.integers(0, 2**40))
def test_an_epoch_holds_every_sample_once(length, seed, epoch):
    assert sorted(order.permutation(length, seed, epoch).tolist()) == list(range(length))


@given(lengths, seeds, st.integers(0, 5), st.data())
def test_every_sample_once_per_epoch_however_steps_are_cut(length, seed, epoch, data):
    """Batches, micro-batches and ranks are all cuts of the sequence of positions."""
    end = (epoch + 1) * length
    cuts = sorted(data.draw(st.sets(st.integers(1, end - 1), max_size=20)) if end > 1 else [])
    pieces = [
        taken(start, stop, length, seed)
        for start, stop in zip([0, *cuts], [*cuts, end], strict=True)
    ]
    seen = [index for piece in pieces for index in piece]
    assert seen == taken(0, end, length, seed)
    assert Counter(seen) == dict.fromkeys(range(length), epoch + 1)


@given(lengths, st.integers(1, 80), seeds, st.integers(0, 4), st.integers(1, 5), st.integers(1, 4))
def test_ranks_and_micro_batches_share_a_step_without_overlap(
    length, batch, seed, step, ranks, micro
):
    base = step * batch
    bounds = np.linspace(0, batch, ranks * micro + 1).astype(int).tolist()
    parts = [taken(base + start, base + stop, length, seed) for start, stop in pairwise(bounds)]
    assert [i for part in parts for i in part] == taken(base, base + batch, length, seed)


@given(lengths, st.integers(0, 200), st.integers(0, 40))
def test_without_shuffling_the_order_is_the_datasets(length, start, count):
    got = order.indices(start, start + count, length=length, seed=0, shuffled=False)
    assert got.tolist() == [position % length for position in range(start, start + count)]


def test_epochs_and_seeds_differ():
    orders = {tuple(order.permutation(50, seed, epoch).tolist()) for seed in range(5)
              for epoch in range(5)}  # fmt: skip
    assert len(orders) == 25


def test_the_order_is_the_same_forever():
    """A checkpoint of an older numpy or Meshwright goes on with the same samples."""
    assert order.permutation(10, 0, 0).tolist() == [8, 7, 4, 2, 6, 5, 9, 0, 1, 3]
    assert order.sample_seeds(7, 3, 5) == [529022155402814617, 4558925090801278541]
    assert order.collate_seed(7, 3) == 7391366078291757867


def test_a_permutation_cannot_be_changed_by_its_reader():
    with pytest.raises(ValueError, match="read-only"):
        order.permutation(10, 0, 0)[0] = 1


@given(seeds, st.integers(0, 2**62))
def test_seeds_fit_63_bits_and_their_uses_differ(seed, key):
    (sample,), collate = order.sample_seeds(seed, key, key + 1), order.collate_seed(seed, key)
    assert 0 <= sample < 2**63
    assert 0 <= collate < 2**63
    assert sample != collate


def test_positions_have_seeds_of_their_own():
    seeds = order.sample_seeds(0, 0, 2000)
    assert len(set(seeds)) == 2000
    assert seeds[1234:1240] == order.sample_seeds(0, 1234, 1240)


@pytest.mark.parametrize(
    ("epochs", "length", "batch", "steps"), [(1, 10, 5, 2), (1, 10, 4, 3), (2, 10, 4, 5)]
)
def test_steps_in_epochs(epochs, length, batch, steps):
    assert order.steps_in(epochs, length, batch) == steps
