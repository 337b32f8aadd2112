"""What a rank holds, in every way at once: ZeRO, pipelines, remat, offload, optimizers.

A pairwise cover of the product is in `make test`, the whole product in `make matrix`.
"""

from __future__ import annotations

import re
from functools import cache
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from meshwright import Job
from meshwright.errors import PlanError
from meshwright.predict import staged
from meshwright.program import away
from meshwright.run.offload import flight
from tests.equal.harness import Case, assert_equal
from tests.equal.optimizers import OPTIMIZERS, decayed
from tests.equal.pairwise import cover, pairs

STEPS, WIDTH, BATCH = 2, 6, 8
PARALLEL = (
    "microbatches=2",
    "tensor=2,microbatches=2",
    "pipeline=2,schedule=gpipe,microbatches=4",
    "pipeline=2,schedule=1f1b,microbatches=4",
    "pipeline=2,schedule=interleaved,virtual=2,microbatches=4",
    "pipeline=2,schedule=zb-h1,microbatches=4",
    "pipeline=2,schedule=zb-v,microbatches=4",
    "pipeline=2,schedule=dualpipe-v,microbatches=4",
)
ZERO = ("data=1", "data=2", "zero1,data=2", "zero2,data=2", "zero3,data=2")
REMAT = ("none", "full", "budget")
OFFLOAD = ("none", "host", "disk")
OWN = {
    "momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9, nesterov=True),
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, eps=1e-3),
    **{name: OPTIMIZERS[name] for name in ("lamb", "lars", "adafactor", "muon", "shampoo")},
}
FACTORS = (PARALLEL, ZERO, REMAT, OFFLOAD, tuple(OWN))


class Block(nn.Module):
    """Wide inside, with a norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.drop(self.down(torch.tanh(self.up(self.norm(x)))))
        return found


class Net(nn.Module):
    """Four blocks, which are two stages of two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 2)
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.last(x)
        return found


def job(optimizer: str) -> Job:
    points = torch.randn(4 * BATCH, 3, generator=torch.Generator().manual_seed(1))
    return Job(
        model=Net,
        loss=lambda model, x: model(x).square().mean(),
        optimizer=OWN[optimizer],
        data=lambda: [*points],
        batch_size=BATCH,
        schedule=decayed,
        clip_norm=0.5,
    )


@cache
def case(optimizer: str) -> Case:
    return Case(job(optimizer))


@cache
def budget(plan: str, optimizer: str) -> int:
    """A little more than the least that the plan can do with, which its refusal says."""
    with pytest.raises(PlanError) as refusal:
        case(optimizer).build(f"{plan},remat=budget:1")
    found = re.search(r"\((\d+) bytes\)", str(refusal.value))
    return int(1.05 * int(found[1]))


def plan_of(parallel: str, zero: str, remat: str, offload: str, optimizer: str) -> str:
    plan = f"{zero},{parallel}"
    if remat == "budget":
        remat = f"budget:{budget(plan, optimizer)}"
    return f"{plan},remat={remat},offload={offload}"


@pytest.fixture(autouse=True)
def all_go(monkeypatch):
    """Tiny values leave too, one at a time."""
    monkeypatch.setattr(away, "LEAST", 0)
    for module in (staged, flight):
        monkeypatch.setattr(module, "FLIGHT", 0)


COVER = cover(FACTORS)


@pytest.mark.parametrize("row", COVER, ids="-".join)
def test_every_two_go_together(row):
    assert_equal(case(row[4]).verify(plan_of(*row), STEPS))


@pytest.mark.matrix
@pytest.mark.parametrize("row", sorted(set(product(*FACTORS)) - set(COVER)), ids="-".join)
def test_and_all_of_them(row):
    assert_equal(case(row[4]).verify(plan_of(*row), STEPS))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=2, max_size=4))
def test_a_cover_holds_every_pair(sizes):
    factors = [[f"{k}{n}" for n in range(size)] for k, size in enumerate(sizes)]
    wanted = set().union(*map(pairs, product(*factors)))
    assert set().union(*map(pairs, cover(factors))) == wanted


def test_the_cover_is_small():
    largest = sorted(map(len, FACTORS))[-2:]
    assert len(COVER) <= 1.3 * largest[0] * largest[1]
