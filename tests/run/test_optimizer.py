"""The user's optimizer, built anew over shards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from meshwright.compile.init import blueprint
from meshwright.errors import PlanError, UserCodeError
from meshwright.run.optimizer import build, is_elementwise, recipe
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
    "adafactor": (lambda m: optim.Adafactor(m.parameters(), lr=0.1), False, 0),
}


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
    with pytest.raises(PlanError, match=r"zero=1, but Normed is not elementwise.*zero=0.*AdamW"):
        on_ranks(
            job(optimizer=lambda m: groups(m, whole=True)), "zero1,data=2", lambda session: None
        )
    alone(job(optimizer=lambda m: groups(m, whole=True)), "zero1,data=1")


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
            r"group 0 holds a tensor of shape \(3, 2\) that is no parameter of the model",
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
