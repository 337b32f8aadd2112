"""Optimizers that need whole tensors, as users write them or take them from torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adafactor, Muon

from meshwright import optim
from meshwright.job import Job
from tests.run.jobs import job, weighted_loss


class Normalized(torch.optim.Optimizer):
    """A user's own: reads norms into Python, branches on them, and keeps a vector."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                norm = p.grad.norm().item()
                if norm > 1e-12:
                    p.data = p.data - group["lr"] * p.grad / norm
                state = self.state[p]
                state["largest"] = torch.maximum(
                    state.get("largest", torch.zeros(())), p.detach().abs().flatten(1).amax(1)
                    if p.dim() > 1 else p.detach().abs()
                )  # fmt: skip
                state["steps"] = state.get("steps", 0) + 1


class Centred(torch.optim.Optimizer):
    """A user's own, all tensors and Python arithmetic: momentum of gradients less their mean."""

    def __init__(self, params: Any, lr: float = 0.05, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._one(p, p.grad, group)

    def _one(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if "t" not in state:
            state["t"], state["mean"] = 0, torch.zeros_like(p)
        state["t"] += 1
        state["mean"].mul_(group["beta"]).add_(grad - grad.mean(), alpha=1 - group["beta"])
        rate = group["lr"] / max(1.0, (1 - group["beta"] ** state["t"]) * 3)
        p.sub_(state["mean"] * rate)


def matrices(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are matrices."""
    return [p for p in model.parameters() if p.dim() == 2]


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "lamb": lambda m: optim.LAMB(m.parameters(), lr=0.02, weight_decay=0.01),
    "lars": lambda m: optim.LARS(m.parameters(), weight_decay=0.01, coefficient=0.1),
    "shampoo": lambda m: optim.Shampoo(m.parameters(), lr=0.05, every=2),
    "shampoo, a side left alone": lambda m: optim.Shampoo(
        m.parameters(), lr=0.05, weight_decay=0.1, largest=16
    ),
    "adafactor": lambda m: Adafactor(m.parameters(), lr=0.1),
    "adafactor, foreach": lambda m: Adafactor(m.parameters(), lr=0.1, foreach=True),
    "muon": lambda m: Muon(matrices(m), lr=0.05),
    "muon, without nesterov": lambda m: Muon(matrices(m), lr=0.05, nesterov=False),
    "a user's, traced": lambda m: Centred(m.parameters()),
    "a user's, run whole": lambda m: Normalized(m.parameters()),
}
WHOLE = {"a user's, run whole"}


def decayed(optimizer: torch.optim.Optimizer) -> Any:
    """A schedule that changes the learning rate at every step."""
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)


def job_of(name: str, **changes: Any) -> Job:
    """A tiny job with this optimizer, clipping, a schedule, and a loss over weighted samples."""
    usual = {"optimizer": OPTIMIZERS[name], "schedule": decayed, "loss": weighted_loss}
    return job(**{**usual, "clip_norm": 0.5, **changes})
