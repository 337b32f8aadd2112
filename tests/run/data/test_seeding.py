"""Seeding the generators that users draw from, and leaving them as they were."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from meshwright.run.data.seeding import Generators, put_back, seed_generators


def draws():
    return random.random(), float(DRAWS["numpy"]()), float(torch.rand(()))


DRAWS = {
    "python": random.random,
    "python normal": lambda: random.gauss(0, 1),
    "numpy": np.random.rand,
    "numpy normal": np.random.randn,
    "torch": lambda: torch.rand(1),
}


def test_equal_seeds_give_equal_draws_and_others_do_not():
    with put_back():
        seen = []
        for seed in (5, 5, 6, 2**63 - 1):
            seed_generators(seed)
            seen.append(draws())
    assert seen[0] == seen[1]
    for one in range(3):
        assert len({draw[one] for draw in seen}) == 3


def test_the_generators_are_put_back_even_after_an_error():
    def fail():
        with put_back():
            seed_generators(1)
            draws()
            raise RuntimeError("user")

    before = Generators.read()
    with pytest.raises(RuntimeError, match="user"):
        fail()
    assert before.same(Generators.read())


@pytest.mark.parametrize("name", DRAWS)
def test_every_draw_is_seen(name):
    with put_back():
        seed_generators(3)
        before = Generators.read()
        assert before.same(Generators.read())
        DRAWS[name]()
        assert not before.same(Generators.read())


def test_the_second_of_a_pair_of_normals_is_seen():
    """numpy makes normals in pairs, so the second leaves the words' position alone."""
    with put_back():
        seed_generators(3)
        DRAWS["numpy normal"]()
        before = Generators.read()
        DRAWS["numpy normal"]()
        assert not before.same(Generators.read())
