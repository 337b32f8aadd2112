"""`plan="auto"`: the first plan whose state fits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from meshwright.errors import OutOfMemory
from meshwright.plan.plan import Plan
from meshwright.run import auto
from meshwright.run.auto import candidates, choose_plan, state_bytes
from tests.run.jobs import job

WIDE = job(model=lambda: nn.Linear(1024, 1024, bias=False))
BYTES = 4 * 1024 * 1024


def with_memory(monkeypatch, per_rank, world):
    free = per_rank * world / auto.SHARE
    monkeypatch.setattr(auto.psutil, "virtual_memory", lambda: SimpleNamespace(available=free + 8))


def test_plans_are_tried_in_order():
    assert list(candidates(1)) == [Plan(data=1)]
    assert [p.text() for p in candidates(2)] == [
        "data=2", "zero1,data=2", "zero2,data=2", "zero3,data=2",
    ]  # fmt: skip
    slices = {p.text().partition(",")[2] for p in list(candidates(2, 8))[1:]}
    assert slices == {"data=2,microbatches=4"}
    assert next(candidates(3, 8)).text() == "data=3,microbatches=8"
    assert next(candidates(8, 8)).text() == "data=8"


@pytest.mark.parametrize(
    ("shares", "plan"),
    [(4, "data=4"), (2.5, "zero1,data=4"), (1.75, "zero2,data=4"), (1, "zero3,data=4")],
)
def test_the_first_that_fits_is_taken(monkeypatch, shares, plan):
    """Weights, gradients and two slots: 4 shares whole, 2.5, 1.75 and 1 under ZeRO on 4 ranks."""
    with_memory(monkeypatch, shares * BYTES, 4)
    assert choose_plan(WIDE, 4).text() == plan
    with_memory(monkeypatch, shares * BYTES - 1024, 4)
    if shares > 1:
        assert choose_plan(WIDE, 4).text() != plan
        return
    with pytest.raises(OutOfMemory, match=r"needs 0.0 GiB a rank even under zero3 on 4 ranks"):
        choose_plan(WIDE, 4)


def test_bytes_are_those_that_are_held():
    values = {"w": auto.Value("float32", (1024, 1024))}
    assert state_bytes(values, Plan(data=1)) == 4 * BYTES
    assert state_bytes(values, Plan(data=4, zero=3)) == BYTES
