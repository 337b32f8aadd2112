"""Optimizers that torch has not, against their papers' formulas, step by step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from meshwright import optim
from meshwright.optim.lamb import trust
from meshwright.optim.shampoo import inverse_root

STEPS = 4


def run(make, shape=(6, 4)):
    """Parameters and gradients of some steps: (before, gradient, after) each."""
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
    optimizer, found = make([p]), []
    for _ in range(STEPS):
        p.grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        before = p.detach().clone()
        optimizer.step()
        found.append((before, p.grad, p.detach().clone()))
    return found


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("adapt", [True, False])
def test_lamb_is_the_papers_algorithm_2(adapt):
    def make(params):
        return optim.LAMB(params, lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.2, adapt=adapt)

    m = v = 0.0
    for t, (w, g, after) in enumerate(run(make), 1):
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        r = (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)) ** 0.5 + 1e-3) + 0.2 * w
        ratio = w.norm() / r.norm() if adapt else 1.0
        close(after, w - 0.1 * ratio * r)


@pytest.mark.parametrize("adapt", [True, False])
def test_lars_is_the_papers_algorithm_1(adapt):
    def make(params):
        return optim.LARS(
            params, lr=0.1, momentum=0.8, weight_decay=0.2, coefficient=0.3, adapt=adapt
        )

    v = 0.0
    for w, g, after in run(make):
        rate = 0.3 * w.norm() / (g.norm() + 0.2 * w.norm()) if adapt else 1.0
        v = 0.8 * v + 0.1 * rate * (g + 0.2 * w)
        close(after, w - v)


def powered(matrix, power):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values**power) @ vectors.T


def test_shampoo_is_the_papers_algorithm_1():
    left = right = None
    for w, g, after in run(lambda p: optim.Shampoo(p, lr=0.1, momentum=0.0, eps=0.5)):
        if left is None:
            left = 0.5 * torch.eye(6, dtype=g.dtype)
            right = 0.5 * torch.eye(4, dtype=g.dtype)
        left, right = left + g @ g.T, right + g.T @ g
        close(after, w - 0.1 * powered(left, -1 / 4) @ g @ powered(right, -1 / 4))


def test_a_long_side_is_left_alone_and_roots_are_kept_between():
    right = root = None
    made = run(lambda p: optim.Shampoo(p, lr=0.1, momentum=0.0, eps=0.5, largest=5, every=2))
    for step, (w, g, after) in enumerate(made):
        right = 0.5 * torch.eye(4, dtype=g.dtype) if right is None else right
        right = right + g.T @ g
        root = powered(right, -1 / 2) if step % 2 == 0 else root
        close(after, w - 0.1 * g @ root)


def test_shampoo_of_vectors_is_adagrad_and_of_more_dims_matrices():
    h = torch.full((5,), 0.5, dtype=torch.float64)
    for w, g, after in run(lambda p: optim.Shampoo(p, lr=0.1, momentum=0.0, eps=0.5), (5,)):
        h = h + g**2
        close(after, w - 0.1 * g / h.sqrt())
    for (_, _, after), (_, _, flat) in zip(
        run(lambda p: optim.Shampoo(p, weight_decay=0.1), (3, 2, 4)),
        run(lambda p: optim.Shampoo(p, weight_decay=0.1), (3, 8)),
        strict=True,
    ):
        close(after, flat.view(3, 2, 4))


def test_of_nothing_the_ratio_is_one():
    zero, some = torch.zeros(3), torch.ones(4)
    assert trust(zero, some) == trust(some, zero) == 1
    assert trust(some, 4 * some) == 0.25


def test_roots_of_what_is_singular_are_finite():
    root = inverse_root(torch.zeros(3, 3), 4, 1e-4)
    torch.testing.assert_close(root, 10 * torch.eye(3))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda p: optim.LAMB(p, lr=-1), "lr is -1, but must be at least 0"),
        (lambda p: optim.LARS(p, coefficient=-2), "coefficient is -2"),
        (lambda p: optim.Shampoo(p, every=0), "every is 0, but must be at least 1"),
        (lambda p: optim.LARS(p, momentum=float("nan")), "momentum is nan"),
    ],
)
def test_settings_are_checked(make, told):
    with pytest.raises(ValueError, match=told):
        make([nn.Parameter(torch.zeros(2, 2))])


@pytest.mark.parametrize("make", [optim.LAMB, optim.LARS, optim.Shampoo])
def test_parameters_without_a_gradient_stay_and_closures_are_called(make):
    p, idle = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = make([p, idle])

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 4
    assert torch.equal(idle, torch.ones(2, 2))
    assert not torch.equal(p, torch.ones(2, 2))
    assert idle not in optimizer.state
