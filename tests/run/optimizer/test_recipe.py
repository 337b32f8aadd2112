"""The user's optimizer, built anew over shards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from meshwright.compile.init import blueprint
from meshwright.errors import PlanError, UserCodeError
from meshwright.plan.plan import Plan
from meshwright.run.optimizer.recipe import build, is_elementwise, recipe, unsplittable
from meshwright.run.prepare import prepare
from tests.run.jobs import Net, alone, job, on_ranks

optim = torch.optim
MODEL = blueprint(Net, 0)


def made(factory):
    return recipe(MODEL, factory)


KINDS = {
    "sgd": (lambda m: optim.SGD(m.parameters(), lr=0.1), True, 0),
    "momentum": (lambda m: optim.SGD(m.parameters(), lr=0.1, momentum=0.9), True, 1),
    "adamw": (lambda m: optim.AdamW(m.parameters(), lr=0.1), True, 2),
    "amsgrad": (lambda m: optim.Adam(m.parameters(), lr=0.1, amsgrad=True), True, 3),
    "nadam": (lambda m: optim.NAdam(m.parameters(), lr=0.1), True, 2),
    "adagrad": (lambda m: optim.Adagrad(m.parameters(), lr=0.1), True, 1),
    "rmsprop": (lambda m: optim.RMSprop(m.parameters(), lr=0.1, centered=True), True, 2),
    "rprop": (lambda m: optim.Rprop(m.parameters(), lr=0.1), True, 2),
    "adamax": (lambda m: optim.Adamax(m.parameters(), lr=0.1), True, 2),
    "radam": (lambda m: optim.RAdam(m.parameters(), lr=0.1), True, 2),
    "asgd": (lambda m: optim.ASGD(m.parameters(), lr=0.1), True, 1),
    "adadelta": (lambda m: optim.Adadelta(m.parameters(), lr=0.1), True, 2),
    "adamw, foreach": (lambda m: optim.AdamW(m.parameters(), lr=0.1, foreach=True), True, 2),
    "adamw, fused": (lambda m: optim.AdamW(m.parameters(), lr=0.1, fused=True), True, 2),
    "sgd, foreach": (
        lambda m: optim.SGD(m.parameters(), lr=0.1, momentum=0.9, foreach=True), True, 1
    ),
    "sgd, fused": (lambda m: optim.SGD(m.parameters(), lr=0.1, momentum=0.9, fused=True), True, 1),
    "adagrad, fused": (lambda m: optim.Adagrad(m.parameters(), lr=0.1, fused=True), True, 1),
    "amsgrad, fused": (
        lambda m: optim.Adam(m.parameters(), lr=0.1, amsgrad=True, fused=True), True, 3
    ),
    "adafactor": (lambda m: optim.Adafactor(m.parameters(), lr=0.1), False, 0),
    "muon": (lambda m: optim.Muon([m.up.weight, m.down.weight], lr=0.1), False, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_whether_an_optimizer_is_elementwise_is_found_by_trying(name):
    factory, elementwise, slots = KINDS[name]
    found = made(factory)
    assert is_elementwise(found) == elementwise
    assert found.slots() == slots


class Normed(optim.Optimizer):
    """Divides by the norm of the whole gradient, in groups that ask for it."""

    def __init__(self, params, lr=0.1, whole=False):
        super().__init__(params, {"lr": lr, "whole": whole})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    by = p.grad.norm() if group["whole"] else 1.0
                    p.data -= group["lr"] * p.grad / by


def test_every_groups_settings_are_tried():
    def groups(m, whole):
        return Normed(
            [{"params": m.up.parameters()}, {"params": m.down.parameters(), "whole": whole}]
        )

    assert is_elementwise(made(lambda m: groups(m, whole=False)))
    assert not is_elementwise(made(lambda m: groups(m, whole=True)))
    assert unsplittable(made(lambda m: groups(m, whole=True))) is None


class Together(optim.Optimizer):
    """Divides by the norm of all gradients of a group, or draws noise."""

    def __init__(self, params, lr=0.1, noise=0.0):
        super().__init__(params, {"lr": lr, "noise": noise})

    def step(self, closure=None):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            by = sum(p.grad.square().sum() for p in params) if not group["noise"] else 1.0
            for p in params:
                noise = torch.randn_like(p) * group["noise"] if group["noise"] else 0.0
                p.data -= group["lr"] * p.grad / by + noise


@pytest.mark.parametrize(
    ("factory", "told"),
    [
        (lambda m: Together(m.parameters()), "steps parameters together: its update of one"),
        (lambda m: Together(m.parameters(), noise=0.1), "draws random numbers in its step"),
    ],
)
def test_what_ranks_cannot_share_is_refused(factory, told):
    assert unsplittable(made(factory)).startswith(told)
    for plan, said in (("zero1,data=2", "zero=1"), ("tensor=2", "tensor=2")):
        with pytest.raises(PlanError, match=rf"{said}, but Together {told}.*AdamW"):
            on_ranks(job(optimizer=factory), plan, lambda session: None)
    alone(job(optimizer=factory), "zero1,data=1")


def test_one_for_sparse_gradients_is_refused():
    sparse = job(optimizer=lambda m: optim.SparseAdam(list(m.parameters())))
    with pytest.raises(UserCodeError, match=r"SparseAdam raised RuntimeError.*dense.*AdamW"):
        on_ranks(sparse, "zero1,data=2", lambda session: None)


def test_replicas_do_not_draw_apart():
    noisy = job(optimizer=lambda m: Together(m.parameters(), noise=0.1))
    with pytest.raises(PlanError, match=r"data=2, but Together draws random.*one rank"):
        on_ranks(noisy, "data=2", lambda session: None)
    with pytest.raises(PlanError, match="draws random"):
        prepare(noisy, Plan.parse("pipeline=2,data=1,microbatches=2"), 2)


def test_groups_and_settings_are_recorded_by_name():
    def factory(m):
        groups = [
            {"params": [m.up.weight, m.down.weight], "weight_decay": 0.3},
            {"params": [m.up.bias], "lr": 0.5, "name": "biases"},
        ]
        return optim.AdamW(groups, lr=0.1, betas=(0.8, 0.9))

    found = made(factory)
    assert found.names == ("up.weight", "down.weight", "up.bias")
    shards = {n: nn.Parameter(torch.zeros(1, 2)) for n in found.names}
    again = build(found, shards)
    assert type(again) is optim.AdamW
    first, second = again.param_groups
    assert (first["weight_decay"], first["lr"], first["betas"]) == (0.3, 0.1, (0.8, 0.9))
    assert (second["lr"], second["name"]) == (0.5, "biases")
    assert first["params"][0] is shards["up.weight"]


class Peculiar(optim.SGD):
    """Needs what no setting tells."""

    def __init__(self, params, table):
        super().__init__(params, lr=table[0])


@pytest.mark.parametrize(
    ("factory", "told"),
    [
        (lambda m: None, r"optimizer\(model\) returned NoneType, but must return"),
        (
            lambda m: optim.SGD([nn.Parameter(torch.zeros(3, 2))], lr=0.1),
            r"group 0 holds a tensor of shape \[3, 2\] that is no parameter of the model",
        ),
        (lambda m: optim.LBFGS(m.parameters()), r"LBFGS computes the loss again.*AdamW"),
        (
            lambda m: Peculiar(m.parameters(), [0.1]),
            r"Peculiar cannot be built over shards.*\(params, \*\*settings\)",
        ),
    ],
)
def test_what_cannot_be_built_anew_is_refused(factory, told):
    with pytest.raises(UserCodeError, match=told):
        alone(job(optimizer=factory))
