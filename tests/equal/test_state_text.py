"""As test_state.py, for text: sequences, experts and pairs of axes with ZeRO, remat and offload.

A pairwise cover is in `make test` but for its costly part, the whole product in `make matrix`.
"""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest

from meshwright.program import away
from tests.equal.cells import example
from tests.equal.harness import Case, assert_equal
from tests.equal.mixtures import mixtral
from tests.equal.pairwise import cover

STEPS = 2
PARALLEL = (
    "context=2,microbatches=2",
    "tensor=2,sequence=tensor,microbatches=2",
    "tensor=2,pipeline=2,schedule=zb-h2,microbatches=3",
    "shard=2,microbatches=2",
    "expert=2",
    "expert=2,pipeline=2",
)
ZERO = ("zero0", "zero1", "zero2", "zero3")
REMAT = ("none", "full", "selective")
OFFLOAD = ("none", "host", "disk", "optimizer:disk+activations")
REDUCE = ("", ",reduce=step", ",reduce=microbatch")
FACTORS = (PARALLEL, ZERO, REMAT, OFFLOAD, REDUCE)


def legal(row):
    """Groups of ranks that share state are for ZeRO."""
    return not (row[0].startswith("shard") and row[1] == "zero0")


COVER = [row for row in cover(FACTORS) if legal(row)]
QUICK = [row for row in COVER if "expert" not in row[0] and "pipeline" not in row[0]][::2]


@cache
def case(experts):
    if experts:
        return Case(mixtral())
    return Case(example("gpt").job(depth=2, width=16, context=8, batch=8, dropout=0.1))


def check(row):
    parallel, zero, remat, offload, reduce = row
    data = 4 if parallel.startswith("shard") else 2
    plan = f"zero={zero[-1]},data={data},{parallel},remat={remat},offload={offload}{reduce}"
    assert_equal(case("expert" in parallel).verify(plan, STEPS))


@pytest.fixture(autouse=True)
def all_go(monkeypatch):
    """Tiny values leave too."""
    monkeypatch.setattr(away, "LEAST", 0)


@pytest.mark.parametrize("row", QUICK, ids="-".join)
def test_every_two_go_together(row):
    check(row)


@pytest.mark.matrix
@pytest.mark.parametrize("row", [row for row in COVER if row not in QUICK], ids="-".join)
def test_so_do_the_costly_ones(row):
    check(row)


@pytest.mark.matrix
@pytest.mark.parametrize(
    "row", [r for r in product(*FACTORS) if legal(r) and r not in COVER], ids="-".join
)
def test_and_all_of_them(row):
    check(row)
