"""bf16: plans equal one device, no sum over ranks is short, and short weights are gathered."""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from meshwright import Job
from meshwright.plan.plan import Plan
from meshwright.program import partition
from meshwright.program.explain import collectives
from meshwright.program.widen import sums_short
from meshwright.run.equality.measure import KINDS, LAW
from meshwright.run.equality.verify import Trial, verify_local
from meshwright.run.step import StepWork
from tests.equal import odd
from tests.equal.cells import MODELS, example
from tests.equal.harness import Case, assert_equal
from tests.equal.test_verify import SMALL, doubled
from tests.equal.traffic import first_step

PLANS = ("data=2", "zero1,data=3", "zero2,data=2,microbatches=2", "zero3,data=3")


@cache
def case(name):
    return Case(MODELS[name](Path()))


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_in_bf16_is_one_device_without_its_rounding(plan):
    assert_equal(case("gpt, dropout").verify(f"{plan},precision=bf16", steps=3))


@pytest.mark.parametrize("name", ["gpt, dropout", "digits, dropout"])
@pytest.mark.parametrize("plan", ["data=2", "zero3,data=3"])
def test_and_with_it_eager_autocast(name, plan):
    outcome = case(name).rounded(f"{plan},precision=bf16")
    assert outcome["passed"], outcome


class Denoiser(nn.Module):
    """Two convolutions of floating inputs, with a bias that batch norm cancels, and noise."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x):
        t, noise = torch.rand(len(x), 1, 1, 1), torch.randn_like(x)
        made = self.last(F.silu(self.norm(self.first(x * (1 - t) + noise * t))))
        return F.mse_loss(made, noise)


def test_convolutions_and_noise_are_verified_in_bf16_too():
    images = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    job = Job(
        Denoiser,
        lambda model, batch: model(batch[0]),
        lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
        lambda: TensorDataset(images),
        12,
    )
    outcome = verify_local(job, Plan.parse("zero2,data=2,precision=bf16"), 2, 2, "float64")
    assert outcome["passed"], outcome
    # The norm cancels that bias, whose gradient is rounding; the mean it keeps drifts along.
    assert set(outcome["rounding"]) <= {"first.bias", "norm.running_mean"}


def test_the_outcome_says_what_was_compared_in_what():
    plan = Plan.parse("zero1,data=2,precision=bf16")
    outcome = verify_local(SMALL, plan, 2, 2, "float64")
    assert outcome["passed"]
    assert outcome["dtype"] == "float64 and bf16"
    rounded = {"loss in bf16": 2.0**-9, "gradients in bf16": 2.0**-7}
    assert outcome["law"] == {**dict.fromkeys(KINDS, LAW), **rounded}
    assert set(outcome["worst_relative_error"]) == set(outcome["law"])
    alone = verify_local(SMALL, plan, 2, 2, "float32")
    assert alone["dtype"] == "bf16"
    assert alone["law"] == rounded


def test_a_wrong_gradient_fails_both(monkeypatch):
    doubled(monkeypatch, "gradient/")
    plan = Plan.parse("data=2,precision=bf16")
    outcome = verify_local(SMALL, plan, 2, 1, "float64")
    errors = outcome["worst_relative_error"]
    assert not outcome["passed"]
    assert errors["gradients"] > 0.1
    assert errors["gradients in bf16"] > 0.1
    assert outcome["first_difference"] is None or "op" in outcome["first_difference"]


def test_a_small_error_in_every_gradient_is_no_rounding(monkeypatch):
    """2 %, which is 3 units in the last place."""
    update = StepWork.update

    def scaled(self, values):
        for name in [name for name in values if name.startswith("reduced/")]:
            values[name] = values[name] * 1.02
        return update(self, values)

    monkeypatch.setattr(StepWork, "update", scaled)
    outcome = verify_local(SMALL, Plan.parse("data=2,precision=bf16"), 2, 1, "float32")
    assert not outcome["passed"]


def test_a_loss_over_pairs_is_not_excused_by_smaller_batches():
    """Halves of the batch make another loss, which float64 shows, and measure no rounding."""
    made = odd.job(lambda: odd.Plain(nn.LayerNorm(32)), loss=odd.contrast)
    plan = Plan.parse("data=2,precision=bf16")
    assert len(Trial.of(made, plan, 2, "float32").other_orders()) == 1
    assert len(Trial.of(SMALL, plan, 2, "float32").other_orders()) == 2


def programs(case_, plan):
    """Every program that rank 0 compiles for a step."""
    (worker, *_), (fetched, *_), _ = first_step(case_, f"{plan},precision=bf16")
    compiled = worker.lowered(fetched).compiled
    locals_ = [*(local for _, local in compiled.units), *compiled.moves]
    return [local.program for local in locals_]


@pytest.mark.parametrize("name", ["gpt, dropout", "digits, dropout", "llama", "vit", "bert"])
@pytest.mark.parametrize("plan", ["data=2", "zero2,data=2", "zero3,data=2"])
def test_no_sum_over_ranks_is_in_16_bits(name, plan):
    for program in programs(case(name), plan):
        assert not [op for op in program.ops if sums_short(op, program)]
        for each, value in program.outputs:
            if each.startswith(("gradient/", "total/")):
                assert program.values[value].dtype == "float32", each


def test_without_widening_some_would_be(monkeypatch):
    """The law above sees what it forbids."""
    monkeypatch.setattr(partition, "with_wide_sums", lambda program: (program, ()))
    made = Case(odd.job(lambda: odd.Plain(nn.LayerNorm(32)), loss=odd.contrast))
    found = [op for p in programs(made, "data=2") for op in p.ops if sums_short(op, p)]
    assert found


@cache
def wide_gpt():
    return Case(example("gpt").job(depth=1, width=128, context=16, batch=8, dropout=0.1))


def test_zero3_gathers_half_the_bytes_and_reduces_all():
    """Of every matrix that a product reads; an embedding is looked up in float32, as autocast does.

    Twice 2 bytes an element in place of twice 4, (N-1)/N of them; gradients stay float32.
    """
    moved = {}
    for precision in ("float32", "bf16"):
        plan = f"zero3,data=2,precision={precision}"
        (worker, *_), (fetched, *_), _ = first_step(wide_gpt(), plan)
        rows = collectives(worker.lowered(fetched).compiled, worker.build.axes)
        moved[precision] = Counter()
        for row in rows:
            moved[precision][row.value] += row.bytes
    parameters = worker.build.model.parameters
    products = [n for n, p in parameters.items() if "weight" in n and "norm" not in n]
    products = [n for n in products if n.split(".")[0] not in ("token", "position")]
    assert len(products) == 7
    for name in products:
        size = parameters[name].numel()
        assert moved["float32"][f"model/{name}"] == 2 * 4 * size // 2
        assert moved["bf16"][f"model/{name}"] == 2 * 2 * size // 2
        assert moved["bf16"][f"gradient/{name}"] == 4 * size // 2
    for name in ("token.weight", "position.weight"):
        assert moved["bf16"][f"model/{name}"] == moved["float32"][f"model/{name}"]
