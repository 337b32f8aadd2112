"""Verify as users call it: its keys, its laws, and where it says a plan went wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from meshwright.comm import local
from meshwright.compile import collective
from meshwright.plan.plan import Plan
from meshwright.run.equality.measure import KINDS, LAW
from meshwright.run.equality.verify import verify_local
from tests.equal import families, odd
from tests.equal.cells import MODELS

SMALL = odd.job(lambda: odd.Plain(nn.LayerNorm(32)))


def verified(job, plan, steps=3, dtype="float64"):
    parsed = Plan.parse(plan)
    return verify_local(job, parsed, parsed.data, steps, dtype)


def test_the_outcome_has_the_keys_that_scripts_read():
    outcome = verified(SMALL, "zero3,data=2")
    assert outcome["passed"] is True
    assert outcome["plan"] == "zero3,data=2"
    assert (outcome["ranks"], outcome["steps"], outcome["dtype"]) == (2, 3, "float64")
    assert set(outcome["worst_relative_error"]) == set(KINDS)
    assert outcome["law"] == dict.fromkeys(KINDS, LAW)
    assert "first_difference" not in outcome


@pytest.mark.parametrize("plan", ["data=3", "zero3,data=2,microbatches=3"])
def test_float32_passes_within_its_own_rounding(plan):
    outcome = verified(MODELS["gpt, dropout"](None), plan, dtype="float32")
    assert outcome["passed"], outcome
    assert outcome["law"]["gradients"] < 1e-3


def test_weights_from_a_folder_are_where_both_begin(tmp_path):
    job = MODELS["finetune"](tmp_path)
    assert job.weights
    assert verified(job, "zero2,data=2", steps=2)["passed"]


def doubled(patch, label):
    """What collectives of this label give is twice what it should be."""
    real = local.collective

    def collective(starts):
        answers = real(starts)
        if not starts[0].label.startswith(label):
            return answers
        return [tuple(2 * tensor for tensor in answer) for answer in answers]

    patch.setattr(local, "collective", collective)


def test_a_wrong_gradient_fails_both_laws_and_is_named(monkeypatch):
    doubled(monkeypatch, "gradient/")
    for dtype in ("float64", "float32"):
        outcome = verified(SMALL, "data=2", dtype=dtype)
        assert not outcome["passed"]
        assert outcome["worst_relative_error"]["gradients"] > 0.1
        assert outcome["worst_relative_error"]["loss"] > 0
    assert "first_difference" in outcome


def vit():
    """An attention's key bias has true gradient zero; torch's eps makes its rounding visible."""
    return replace(
        families.vit(), optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2)
    )


def test_rounding_that_the_optimizer_amplifies_is_no_failure():
    outcome = verified(vit(), "data=2")
    errors = outcome["worst_relative_error"]
    assert errors["weights"] > LAW
    assert max(errors["gradients"], errors["loss"], errors["optimizer"]) < LAW
    assert outcome["law"]["weights"] == LAW
    assert outcome["rounding"]
    for name, (error, own) in outcome["rounding"].items():
        assert "k_proj.bias" in name  # softmax cancels a key's bias: its true gradient is zero
        assert LAW < error <= own < 1e-5
    assert outcome["passed"]


def test_weights_that_differ_by_more_than_rounding_fail_all_the_same(monkeypatch):
    monkeypatch.setattr(collective, "_lay", lambda *_: None)  # updated weights stay where they are
    outcome = verified(SMALL, "zero1,data=2", steps=1)
    assert outcome["worst_relative_error"]["gradients"] < LAW
    assert outcome["worst_relative_error"]["weights"] > 1e-3
    assert not outcome["passed"]
