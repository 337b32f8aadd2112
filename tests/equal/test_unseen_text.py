"""Text families that the compiler was not developed against equal one device.

`make test` runs three cells, of what the first run lacked; `make matrix` runs every cell, and one
of each family of the sweep.
"""

from __future__ import annotations

from functools import cache

import pytest

from meshwright.errors import NotTraceable, UserCodeError
from tests.equal import unseen_sweep, unseen_text
from tests.equal.harness import Case, assert_equal, unruled

FAMILIES = {**unseen_text.UNSEEN, **unseen_sweep.UNSEEN}
REFUSED = {
    "flaubert": (NotTraceable, r"modeling_flaubert\.py:\d+: the model reads a tensor's value"),
    "xlm": (NotTraceable, r"modeling_xlm\.py:\d+: the model reads a tensor's value"),
    "ibert": (NotTraceable, r"quant_modules\.py:\d+: the model reads a tensor's value"),
    "jetmoe": (NotTraceable, r"modeling_jetmoe\.py:\d+: the model reads a tensor's value"),
    # Where it is traced it makes a mask of ones, which its own code cannot add to its landmarks'.
    "nystromformer": (UserCodeError, r"the model or loss raised RuntimeError"),
}
"""What cannot be traced, and where it is said."""
PLANS = ("data=2", "tensor=2", "data=2,tensor=2,microbatches=3", "zero3,data=2,tensor=2")
SAMPLE = (
    ("fnet", "data=2"),
    ("cohere", "tensor=2"),
    ("llama4_text", "tensor=2"),
)


@pytest.fixture(scope="module")
def case():
    """Family -> its case; kept for the cells of one family, which follow each other."""
    return cache(lambda name: Case(FAMILIES[name]()))


def equals(made, plan):
    assert unruled(made, plan) == set()
    assert_equal(made.verify(plan, steps=2))


@pytest.mark.parametrize(("name", "plan"), SAMPLE)
def test_an_unseen_family_equals_one_device(case, name, plan):
    equals(case(name), plan)


@pytest.mark.matrix
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", [name for name in unseen_text.UNSEEN if name not in REFUSED])
def test_every_unseen_family_equals_one_device(case, name, plan):
    equals(case(name), plan)


@pytest.mark.matrix
@pytest.mark.parametrize("name", [name for name in unseen_sweep.UNSEEN if name not in REFUSED])
def test_every_family_of_the_sweep_equals_one_device(case, name):
    equals(case(name), "data=2,tensor=2")


@pytest.mark.matrix
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_traced_is_refused_with_its_line(case, name):
    kind, told = REFUSED[name]
    with pytest.raises(kind, match=told):
        case(name).verify("data=2", steps=1)


def test_no_family_is_of_the_lists_that_the_compiler_was_developed_against():
    from tests.equal import zoo_text

    seen = {family.kind for family in zoo_text.FAMILIES.values()}
    asked = {family.kind for family in unseen_text.TABLE.values()} | set(unseen_sweep.KINDS)
    assert not seen & asked
