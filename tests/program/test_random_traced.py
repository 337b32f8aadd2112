"""Random losses and their gradients, traced, under random annotations: the laws hold for them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from tests.program.test_random import THOROUGH, kept, settled, values_and_moves
from tests.program.traced import traces


def traced_laws(case):
    values_and_moves(case)
    kept(case)
    settled(case)


@settings(max_examples=30, **THOROUGH)
@given(case=traces())
def test_gradients_are_those_of_one_device(case):
    traced_laws(case)


@pytest.mark.matrix
@pytest.mark.parametrize("_part", range(10))
@settings(max_examples=50, **THOROUGH)
@given(case=traces())
def test_many_gradients_are_those_of_one_device(_part, case):
    traced_laws(case)
