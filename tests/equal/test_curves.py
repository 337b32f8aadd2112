"""Loss curves of the example's GPT: 16 bits stay within a band of float32, from step to step."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from meshwright.run.optimizer import stochastic
from tests.equal.cells import example
from tests.run.jobs import alone, losses, on_ranks

STEPS, LAST = 60, 20
BAND, WIDER = 0.005, 0.01
"""Of float32's loss, the mean over the last steps, as docs/precision.md says; the latter of the
larger model. Seeds are 3 % apart."""


@cache
def small():
    return example("gpt").job(depth=1, width=32, context=16, batch=16, lr=3e-3)


def curve(made, plan, steps):
    return torch.tensor(losses(alone(made, plan), steps))


@cache
def wide():
    """The curve of float32, on one device."""
    return curve(small(), "data=1", STEPS)


def apart(found, wanted):
    """How much higher the last losses are than they should be, relatively."""
    return float(found[-LAST:].mean() / wanted[-LAST:].mean() - 1)


def test_pure_bf16_learns_as_float32_does():
    found = curve(small(), "data=1,precision=bf16-pure", STEPS)
    assert wide()[-LAST:].mean() < 0.6 * wide()[0]
    assert abs(apart(found, wide())) < BAND
    assert not torch.equal(found, wide())


@pytest.mark.matrix
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_so_do_mixed_ones(precision):
    assert abs(apart(curve(small(), f"data=1,precision={precision}", STEPS), wide())) < BAND


@pytest.mark.matrix
def test_rounding_to_the_nearest_is_outside_the_band(monkeypatch):
    monkeypatch.setattr(stochastic, "rounded", lambda x, _: x.to(torch.bfloat16))
    assert apart(curve(small(), "data=1,precision=bf16-pure", STEPS), wide()) > WIDER


@pytest.mark.matrix
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_curves_of_a_larger_model_on_ranks(seed):
    made = example("gpt").job(depth=1, width=64, context=32, batch=16, seed=seed, lr=3e-3)
    wanted = curve(made, "data=1", 120)
    for precision, plan in (
        ("bf16", "data=2"),
        ("fp16", "zero3,data=2"),
        ("bf16-pure", "zero2,data=2"),
        ("bf16-pure", "pipeline=2,microbatches=2"),
    ):
        results = on_ranks(made, f"{plan},precision={precision}", lambda s: losses(s, 120))
        assert abs(apart(torch.tensor(results[0]), wanted)) < WIDER, (precision, plan)
