"""Rules that users declare."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import meshwright as mw
from meshwright import Job
from meshwright.errors import PlanError, UsageError
from meshwright.program.program import Op, Ref, Value
from meshwright.program.rules import rule_of
from tests.equal.harness import Case, assert_equal, unruled
from tests.equal.odd import WIDTH, Mixed, adamw, classify


@torch.library.custom_op("mwtest::scan", mutates_args=())
def scan(x: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """x (b s d), decay (d): out[:, t] = decay out[:, t - 1] + x[:, t]."""
    out, state = [], torch.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        state = decay * state + x[:, t]
        out.append(state)
    return torch.stack(out, 1)


@scan.register_fake
def _(x, decay):
    return torch.empty_like(x)


@torch.library.custom_op("mwtest::scan_backward", mutates_args=())
def scan_backward(
    grad: torch.Tensor, x: torch.Tensor, decay: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x and decay."""
    before = torch.cat([torch.zeros_like(x[:, :1]), scan(x, decay)[:, :-1]], 1)
    found, state = [], torch.zeros_like(grad[:, 0])
    for t in reversed(range(grad.shape[1])):
        state = grad[:, t] + decay * state
        found.append(state)
    dx = torch.stack(found[::-1], 1)
    return dx, (dx * before).sum((0, 1))


@scan_backward.register_fake
def _(grad, x, decay):
    return torch.empty_like(x), torch.empty_like(decay)


def _setup(ctx, inputs, output):
    del output
    ctx.save_for_backward(*inputs)


scan.register_autograd(
    lambda ctx, grad: scan_backward(grad, *ctx.saved_tensors), setup_context=_setup
)


class Scanner(nn.Module):
    """Up, scan over four steps, down."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 4 * 16)
        self.decay = nn.Parameter(torch.full((16,), 0.5))
        self.down = nn.Linear(16, 5)

    def forward(self, x):
        steps = self.up(x).unflatten(-1, (4, 16))
        return self.down(scan(steps, self.decay).sum(1))


@pytest.fixture
def declared():
    mw.rule("mwtest::scan", "b s d, d -> b s d", whole="s")
    mw.rule("mwtest::scan_backward", "b s d, b s d, d -> b s d, d", whole="s", sums="b")


@pytest.mark.usefixtures("declared")
@pytest.mark.parametrize("plan", ["data=2", "tensor=2", "zero3,data=2,tensor=2"])
def test_an_op_with_a_rule_of_the_users_runs_on_shards(plan):
    case = Case(Job(Scanner, classify("x"), adamw, Mixed, 12))
    assert_equal(case.verify(plan, steps=2))
    assert not unruled(case, plan)


@pytest.mark.usefixtures("declared")
def test_what_it_splits_is_what_it_says():
    values = (Value("float32", (6, 4, 8)), Value("float32", (8,)), Value("float32", (6, 4, 8)))
    rule = rule_of(Op("mwtest.scan.default", (Ref(0), Ref(1)), (), (2,)), values)
    assert rule.operands == (((0,), (1,), (2,)), ((2,),))
    assert rule.whole == {1}


@pytest.mark.parametrize(
    ("op", "pattern", "more", "says"),
    [
        ("scan", "a -> a", {}, "'namespace::name'"),
        ("my::op", "a, b", {}, "one ->"),
        ("my::op", "a b -> a", {"whole": "c"}, "'c' is no letter"),
        ("my::op", "a b -> a", {"sums": "a"}, "'a' is in every result"),
        ("my::op", "a ? -> a", {}, "neither a letter"),
    ],
)
def test_a_malformed_rule_is_refused(op, pattern, more, says):
    with pytest.raises(UsageError, match=says):
        mw.rule(op, pattern, **more)


def test_a_rule_that_does_not_fit_its_use_names_the_line():
    mw.rule("mwtest::other", "a b -> a b")
    values = (Value("float32", (6,)), Value("float32", (6,)))
    with pytest.raises(PlanError, match=r"model.py:3: the op has operands of shapes \[\[6\]\]"):
        rule_of(Op("mwtest.other.default", (Ref(0),), (), (1,), source="model.py:3"), values)
