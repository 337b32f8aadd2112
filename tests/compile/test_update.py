"""An optimizer's step as a program."""

from __future__ import annotations

import math
from math import sqrt

import pytest
import torch
from torch import Tensor, optim

from meshwright.comm.local import LocalWorld
from meshwright.compile.interpret import interpret
from meshwright.compile.scalar import Expression
from meshwright.compile.update import Form, trace_update
from meshwright.errors import NotTraceable
from meshwright.program.program import Value

SHAPE = (6, 4)
FORM = Form(Value("float64", SHAPE))
RATE = {"lr": 0.1}


class Own(optim.Optimizer):
    """Calls a function with (parameter, gradient, state, group)."""

    def __init__(self, params, update, lr=0.1, betas=(0.9, 0.99)):
        super().__init__(params, {"lr": lr, "betas": betas})
        self.update = update

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.update(p, p.grad, self.state[p], group)


def own(update):
    return lambda tensor: Own([tensor], update)


def both(make, steps=4, rates=(0.1, 0.2, 0.05, 0.3)):
    """Steps of the class, eager, and of its programs: the parameter and state after each."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    eager = start.clone()
    optimizer = make(eager)
    here, state, found = start.clone(), {}, []
    for step in range(steps):
        gradient = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
        optimizer.param_groups[0]["lr"] = rates[step]
        eager.grad = gradient
        optimizer.step()
        tensors = {s: t for s, t in state.items() if isinstance(t, Tensor)}
        shapes = {s: Value(str(t.dtype)[6:], tuple(t.shape)) for s, t in tensors.items()}
        numbers = {f"state.{s}": v for s, v in state.items() if s not in tensors}
        inputs = {"lr": rates[step]} | numbers
        inputs |= {"betas.0": 0.9, "betas.1": 0.99} if isinstance(optimizer, Own) else {}
        update = trace_update(make, Form.of(FORM.parameter, shapes, state), inputs)
        assert update.holds(inputs)
        given = {"parameter": here, "gradient": gradient, **update.constants, **update.host(inputs)}
        given |= {f"state/{s}": t for s, t in tensors.items()}
        (made,) = LocalWorld(1).perform([interpret(update.program, given)])
        here = made.pop("parameter")
        state = {n.removeprefix("state/"): t for n, t in made.items()}
        state |= dict.fromkeys(update.numbers, step + 1)
        found.append(update)
        torch.testing.assert_close(here, eager, rtol=1e-13, atol=1e-13)
        for slot, value in optimizer.state[eager].items():
            if isinstance(value, Tensor):
                torch.testing.assert_close(state[slot], value, rtol=1e-13, atol=1e-13)
    return found


KINDS = {
    "adafactor": lambda p: optim.Adafactor([p], lr=0.1),
    "adafactor, maximize": lambda p: optim.Adafactor([p], lr=0.1, maximize=True, weight_decay=0.1),
    "muon": lambda p: optim.Muon([p], lr=0.1),
    "muon, as adamw": lambda p: optim.Muon([p], lr=0.1, adjust_lr_fn="match_rms_adamw"),
    "adamw": lambda p: optim.AdamW([p], lr=0.1, foreach=False),
    "amsgrad": lambda p: optim.Adam([p], lr=0.1, amsgrad=True, foreach=False),
    "sgd": lambda p: optim.SGD([p], lr=0.1, momentum=0.9, nesterov=True, foreach=False),
    "nadam": lambda p: optim.NAdam([p], lr=0.1, foreach=False),
    "adagrad": lambda p: optim.Adagrad([p], lr=0.1, foreach=False),
    "rmsprop": lambda p: optim.RMSprop([p], lr=0.1, centered=True, foreach=False),
    "adadelta": lambda p: optim.Adadelta([p], lr=0.1, foreach=False),
}


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_a_step_of_torchs_own_is_its_program(name):
    both(KINDS[name], steps=3)


@pytest.mark.matrix
@pytest.mark.parametrize("name", KINDS)
def test_every_step_of_torchs_own_is_its_program(name):
    both(KINDS[name])


def weighed(p, grad, state, group):
    """Every way in which numbers meet tensors."""
    lr, (one, two) = group["lr"], group["betas"]
    if not state:
        state["step"], state["v"] = 0, torch.full_like(p, 0.5)
        state["at"] = torch.tensor(3.0, dtype=p.dtype)
    state["step"] += 1
    rate = min(lr, 1 / math.sqrt(state["step"]))
    state["v"].mul_(two).addcmul_(grad, grad, value=1 - two)
    state["at"] *= rate
    p.lerp_(grad, rate * 0.1)
    p.addcdiv_(grad, state["v"].sqrt() + 1.0, value=-rate)
    p.sub_(grad, alpha=rate).clamp_(min=-9 * lr - 9, max=11.0)
    p += rate * torch.ones(4, dtype=p.dtype)
    p /= 1 + rate
    p.copy_(torch.add(p, grad, alpha=one ** state["step"]) ** (1 + 0 * lr))
    p.copy_(rate - (rate - p) + torch.tensor(lr, dtype=p.dtype) * 0.1)
    p.data.add_(torch.full((4,), lr, dtype=p.dtype))
    p.data = p.data - rate * p.grad.data / max(1.0, p.norm().item())


def test_numbers_meet_tensors_in_every_usual_way():
    first, *others = both(own(weighed))
    assert first.numbers == {"step": 1}
    assert all(str(u.numbers["step"]) == "add(state.step, 1)" for u in others)
    assert set(first.slots) == {"v", "at"}
    (condition,) = first.conditions
    assert condition == (Expression("gt", (Expression("input", ("lr",)), 1.0)), False)


def every_other(p, grad, state, group):
    state["step"] = state.get("step", 0) + 1
    if state["step"] % 2 == 0:
        p.sub_(grad * grad.norm(), alpha=group["lr"])


def test_a_branch_on_the_step_is_a_program_each():
    one, two, three, _ = both(own(every_other))
    assert not one.conditions  # its step is the number 1
    assert two.program.ops
    assert not three.program.ops
    now = {"lr": 0.1, "betas.0": 0.9, "betas.1": 0.99}
    assert [two.holds({**now, "state.step": step}) for step in (1, 2, 3)] == [True, False, True]
    assert [three.holds({**now, "state.step": step}) for step in (1, 2, 3)] == [False, True, False]


def test_a_norm_is_a_root_of_a_sum_but_not_where_it_is_rounded():
    names = [op.base for op in trace_update(KINDS["adafactor"], FORM, RATE).program.ops]
    assert "aten.linalg_vector_norm" not in names
    names = [op.base for op in trace_update(KINDS["muon"], FORM, RATE).program.ops]
    assert names.count("aten.linalg_vector_norm") == 1


def test_lines_are_the_users():
    update = trace_update(own(every_other), Form(FORM.parameter, (), ("step",)), NOW)
    assert {op.source.rpartition(":")[0] for op in update.program.ops} == {__file__}
    assert {op.phase for op in update.program.ops} == {"finish"}
    ours = trace_update(KINDS["muon"], FORM, RATE)
    assert {op.source for op in ours.program.ops} == {""}


NOW = {"lr": 0.1, "betas.0": 0.9, "betas.1": 0.99, "state.step": 1}


def branching(p, grad, state, group):
    if grad.norm() > 1:
        p.sub_(grad)


def reading(p, grad, state, group):
    if p.norm().item() > 1:
        p.sub_(grad)


def rooting(p, grad, state, group):
    p.sub_(grad * sqrt(group["lr"]))


def changing(p, grad, state, group):
    group["betas"] = (0.5, 0.5)


def listing(p, grad, state, group):
    state["old"] = [grad]


def sizing(p, grad, state, group):
    p.sub_(grad.reshape(-1)[: int(group["lr"] * 100)].sum())


@pytest.mark.parametrize(
    ("update", "told"),
    [
        (branching, r"test_update.py:\d+: a branch depends on a number read from a tensor"),
        (reading, r"test_update.py:\d+: a branch depends on a number read from a tensor"),
        (rooting, r"cannot be followed \(math functions taken by `from math import`"),
        (changing, "changes its group's setting 'betas'"),
        (listing, "keeps a list as its state 'old'"),
        (sizing, r"test_update.py:\d+: a number that changes from step to step is made an int"),
    ],
)
def test_what_cannot_be_traced_is_told_with_its_line(update, told):
    with pytest.raises(NotTraceable, match=told):
        trace_update(own(update), FORM, {k: v for k, v in NOW.items() if k != "state.step"})


def noisy(p, grad, state, group):
    p.add_(torch.randn_like(p), alpha=group["lr"])


def test_random_numbers_are_refused():
    with pytest.raises(NotTraceable, match="draws random numbers"):
        trace_update(own(noisy), FORM, {"lr": 0.1})
