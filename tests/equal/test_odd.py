"""Odd models under data and ZeRO plans equal eager training on one device."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

from meshwright.errors import NotTraceable, UserCodeError
from tests.equal.harness import Case, assert_equal, unruled, verify_local
from tests.equal.odd import ODD, TOKENS, WIDTH, Plain, Sequences, job

UNTRACEABLE = "batch norm 1d, cumulative"
PLANS = ["data=2", "zero1,data=3", "zero2,data=2", "zero3,data=3", "zero3,data=4"]


@cache
def case(name):
    return Case(ODD[name]())


def normalizes(name):
    """Batch norm fixes the micro-batch."""
    return "batch norm" in name


TRACED = [name for name in ODD if name != UNTRACEABLE]


@pytest.mark.parametrize("name", TRACED)
def test_an_odd_model_equals_eager_and_every_op_has_a_rule(name):
    plan = "zero3,data=3" + ("" if normalizes(name) else ",microbatches=2")
    assert_equal(case(name).verify(plan, steps=3))
    assert unruled(case(name), plan) == set()


@pytest.mark.matrix
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", TRACED)
def test_an_odd_model_equals_eager_under_every_plan(name, plan):
    assert_equal(case(name).verify(plan))
    if not normalizes(name):
        assert_equal(case(name).verify(f"{plan},microbatches=3"))


def test_an_unused_parameter_keeps_no_state():
    made = case("unused parameter")
    report = made.verify("zero1,data=2", steps=1)
    snapshot = made.reference(made.build("zero1,data=2")).after(0)
    assert_equal(report)  # a slot that one side has and the other lacks is an infinite error
    assert not [name for name in snapshot.optimizer if "spare" in name or "idle" in name]


def test_a_forward_that_reads_a_value_is_refused_with_its_line():
    with pytest.raises(NotTraceable, match=r"odd\.py:\d+: the model reads a tensor's value"):
        verify_local(ODD[UNTRACEABLE](), "data=2", steps=1)


class Lamb(torch.optim.Optimizer):
    """Updates of the norm of the whole parameter: an element's depends on the others."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.norm() / (p.grad.norm() + 1e-6) * p.grad, alpha=group["lr"])


def lamb():
    return job(Plain, optimizer=lambda model: Lamb(model.parameters()))


@pytest.mark.parametrize("plan", ["data=3", "zero1,data=2", "zero2,data=2", "zero3,data=2"])
def test_an_optimizer_that_needs_whole_tensors_runs_where_they_are_and_where_they_are_not(plan):
    assert_equal(verify_local(lamb(), plan))


class Grows(nn.Module):
    """A buffer that is longer after each forward."""

    def __init__(self):
        super().__init__()
        self.register_buffer("past", torch.zeros(1, 32))

    def forward(self, x):
        self.past = torch.cat([self.past, x[:1].detach()])
        return x + self.past[0]


def test_a_buffer_that_changes_its_shape_is_refused_by_name():
    with pytest.raises(UserCodeError, match=r"buffer middle\.past .*must keep its shape and dtype"):
        verify_local(job(lambda: Plain(Grows())), "data=2", steps=1)


class Teacher(Plain):
    """A slow copy of a layer, which the forward itself moves."""

    def __init__(self):
        super().__init__()
        self.slow = nn.Linear(32, 32).requires_grad_(requires_grad=False)

    def forward(self, x):
        with torch.no_grad():
            self.slow.weight.mul_(0.9).add_(self.up.weight @ self.up.weight.t(), alpha=0.1)
        return self.down(self.slow(self.up(x)))


class Clipped(Plain):
    """Clips its weights behind autograd's back."""

    def forward(self, x):
        self.up.weight.data.clamp_(-0.1, 0.1)
        return super().forward(x)


class Level(Plain):
    """A tensor attribute that is not registered, replaced in the forward."""

    def __init__(self):
        super().__init__()
        self.level = torch.ones(32)

    def forward(self, x):
        hidden = self.up(x)
        self.level = 0.9 * self.level + hidden.detach().mean(0)
        return self.down(hidden / self.level)


@pytest.mark.parametrize(
    ("model", "what"),
    [(Teacher, "parameter slow.weight"), (Clipped, "parameter up.weight"), (Level, "tensor level")],
)
def test_what_a_forward_would_lose_is_refused_with_its_line(model, what):
    with pytest.raises(UserCodeError, match=rf"test_odd\.py:\d+: the forward writes to .*{what}"):
        verify_local(job(model), "data=2", steps=1)


def test_a_hook_that_waits_for_grad_is_refused():
    def model():
        made = Plain()
        made.up.weight.register_post_accumulate_grad_hook(lambda _: None)
        return made

    with pytest.raises(
        NotTraceable, match=r"up\.weight has a hook .*register_hook, or use --eager"
    ):
        verify_local(job(model), "data=2", steps=1)


def test_a_sparse_gradient_is_refused_by_name():
    def model():
        made = Sequences(nn.Identity())
        made.token = nn.Embedding(TOKENS, WIDTH, sparse=True)
        return made

    with pytest.raises(NotTraceable, match=r"gradient of token\.weight is sparse.*sparse=False"):
        verify_local(job(model, "tokens"), "data=2", steps=1)


def test_an_optimizer_that_needs_a_closure_is_refused():
    made = job(Plain, optimizer=lambda model: torch.optim.LBFGS(model.parameters()))
    with pytest.raises(UserCodeError, match=r"LBFGS computes the loss again .* a closure"):
        verify_local(made, "data=2", steps=1)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, maximize=True),
        lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-3), eps=1e-6, amsgrad=True),
        lambda p: torch.optim.AdamW(p, eps=1e-6, fused=True),
        lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
        lambda p: torch.optim.Adagrad(p, lr=0.01),
        lambda p: torch.optim.NAdam(p, eps=1e-6),
    ],
    ids=["sgd", "amsgrad", "fused", "rmsprop", "adagrad", "nadam"],
)
def test_elementwise_optimizers_step_on_shards(make):
    made = job(Plain, optimizer=lambda model: make(model.parameters()))
    assert_equal(verify_local(made, "zero3,data=3", steps=3))


def test_batches_that_ranks_do_not_divide():
    assert_equal(verify_local(job(Plain, batch=13), "zero2,data=4,microbatches=3"))


def test_a_rank_with_one_sample():
    assert_equal(verify_local(job(Plain, batch=5), "zero1,data=5"))
