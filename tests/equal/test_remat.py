"""What is computed again makes no difference: a sample here, every cell in `make matrix`."""

from __future__ import annotations

from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

from meshwright import Job
from meshwright.errors import PlanError
from meshwright.predict.memory import live_bytes
from meshwright.program import remat as pass_
from meshwright.run.bill import bills
from meshwright.run.form import first_micros
from tests.equal.cells import MODELS, example
from tests.equal.harness import Case, assert_equal
from tests.equal.pipelines import PIPELINES

STEPS = 2
POLICIES = ("full", "selective", "budget")
BESIDE = (
    "data=2",
    "zero3,data=2,microbatches=2",
    "tensor=2",
    "tensor=2,sequence=tensor",
    "pipeline=2,microbatches=4",
    "pipeline=2,schedule=zb-h1,microbatches=2",
    "zero1,data=2,pipeline=2,schedule=interleaved,virtual=2,microbatches=2",
)
FAMILIES = ("gpt2", "t5", "unet", "resnet", "mixtral")


class Marked(nn.Module):
    """Blocks with dropout, each in a checkpoint region; one of either of torch's kinds."""

    def __init__(self, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(8, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.2),
                          nn.Linear(2 * width, width))
            for _ in range(depth)
        )  # fmt: skip
        self.last = nn.Linear(width, 1)

    def forward(self, x):
        x = self.first(x)
        for place, block in enumerate(self.blocks):
            x = x + checkpoint(block, x, use_reentrant=place == 0)
        return self.last(x).square().mean()


def marked():
    points = torch.randn(24, 8, generator=torch.Generator().manual_seed(1))
    return Job(
        Marked,
        lambda model, batch: model(batch[0]),
        lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
        lambda: TensorDataset(points),
        12,
    )


@cache
def case(name):
    if name == "marked":
        return Case(marked())
    if name == "gpt, deep":
        return Case(example("gpt").job(depth=3, width=32, context=16, batch=12, dropout=0.1))
    made = MODELS[name](Path()) if name in MODELS else PIPELINES[name.replace("gpt2", "gpt")](1)
    return Case(made)


def within(name, plan, share):
    """The plan with a budget that leaves so much of what is between nothing saved and all."""
    build = case(name).build(plan, torch.float64)
    micros = first_micros(build, case(name).data)
    most = [sum(bill.values()) for bill in bills(build, micros)]
    again = case(name).build(f"{plan},remat=full", torch.float64)
    least = max(sum(bill.values()) for bill in bills(again, micros))
    return f"{plan},remat=budget:{int(least + share * max(0, max(most) - least))}"


def equals(name, plan, policy):
    plan = within(name, plan, 0.4) if policy == "budget" else f"{plan},remat={policy}"
    assert_equal(case(name).verify(plan, STEPS))
    return plan


SAMPLE = (
    ("gpt, deep", "zero3,data=2,microbatches=2", "full"),
    ("gpt, deep", "tensor=2,sequence=tensor", "selective"),
    ("gpt, deep", "data=2", "budget"),
    ("marked", "pipeline=2,microbatches=4", "budget"),
    ("resnet", "data=2", "full"),
    ("unet", "pipeline=2,schedule=zb-h1,microbatches=2", "selective"),
    ("marked", "data=2", "marks"),
    ("marked", "zero3,data=2", "marks"),
    ("marked", "pipeline=2,microbatches=2", "marks"),
)


@pytest.mark.parametrize(("name", "plan", "policy"), SAMPLE)
def test_a_plan_that_computes_again_equals_one_device(name, plan, policy):
    equals(name, plan, policy)


@pytest.mark.matrix
@pytest.mark.parametrize(("name", "plan", "policy"), list(product(FAMILIES, BESIDE, POLICIES)))
def test_every_family_under_every_plan(name, plan, policy):
    if name == "resnet" and "microbatches" in plan:
        with pytest.raises(PlanError, match="normalize_over"):
            equals(name, plan, "full")
        return
    equals(name, plan, policy)


@pytest.mark.matrix
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("plan", ["expert=2", "zero3,expert=2,data=2"])
def test_experts_send_their_rows_again(plan, policy):
    equals("mixtral", plan, policy)


def first_program(name, plan):
    build = case(name).build(plan, None)
    compiled = build.lowered(0, first_micros(build, case(name).data)).compiled
    return compiled.units[0][1].program


def test_a_budget_is_kept_and_more_room_means_less_work():
    model, done = case("unet"), []
    plain = model.build("data=1")
    most = max(sum(bill.values()) for bill in bills(plain, first_micros(plain, model.data)))
    for budget in (int(most * 0.98), int(most * 0.92), most):
        build = model.build(f"data=1,remat=budget:{budget}")
        micros = first_micros(build, model.data)
        assert max(sum(bill.values()) for bill in bills(build, micros)) <= budget
        done.append(len(build.lowered(0, micros).compiled.units[0][1].program.ops))
    assert done[2] < done[0] <= done[1]


def test_a_budget_that_cannot_be_kept_says_the_least_that_can():
    told = r"the least that a rank can hold is .* \([0-9]+ bytes\)"
    with pytest.raises(PlanError, match=told) as caught:
        case("marked").build("data=2,remat=budget:1KiB")
    least = int(str(caught.value).partition("(")[2].partition(" ")[0])
    build = case("marked").build(f"data=2,remat=budget:{least}")
    micros = first_micros(build, case("marked").data)
    assert max(sum(bill.values()) for bill in bills(build, micros)) <= least
    with pytest.raises(PlanError, match="the least"):
        case("marked").build(f"data=2,remat=budget:{int(least * 0.98)}")


def test_marks_save_what_torch_would():
    """Of a region its input alone: without it, two products' inputs, the GELU's, a mask."""
    plain, again = (first_program("marked", f"data=1{m}") for m in ("", ",remat=marks"))
    samples, width = 12, 16
    region = (2 * width + 2 * width + 2 * width) * 4 * samples
    saved = [live_bytes(program)[0] for program in (plain, again)]
    assert saved[0] - saved[1] == 3 * region


def test_a_model_without_marks_is_told_so():
    with pytest.raises(PlanError, match="the model has none"):
        case("unet").verify("data=1,remat=marks", 1)


@pytest.mark.parametrize("wrong", ["draw", "kept"])
def test_a_wrong_repeat_fails(monkeypatch, wrong):
    """Another draw than the forward's; a value of the forward in place of another."""
    run = pass_._Rewriting._repeat

    def other(self, number):
        run(self, number)
        place, op = self.ops[-1]
        if wrong == "draw" and op.base == "meshwright.draw":
            args = (*op.args[:2], op.args[2] + 1, *op.args[3:])
            self.ops[-1] = place, pass_.replace(op, args=args)
        if wrong == "kept" and op.base == "aten.gelu":
            self.ops[-1] = place, pass_.replace(op, name="aten.relu.default", kwargs=())

    monkeypatch.setattr(pass_._Rewriting, "_repeat", other)
    assert not case("gpt, deep").verify("data=2,remat=full", 1).passed
