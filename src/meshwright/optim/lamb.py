"""LAMB: Adam's update, scaled layer by layer to the size of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from meshwright.optim.settings import require_at_least

__all__ = ["LAMB", "trust"]


class LAMB(torch.optim.Optimizer):
    """You et al. 2020, "Large Batch Optimization for Deep Learning", algorithm 2.

    A group with `adapt=False` takes Adam's update as it is: usual for biases and norms.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        adapt: bool = True,
    ) -> None:
        """Settings as AdamW's.

        Raises:
            ValueError: a setting is negative.
        """
        require_at_least(0, lr=lr, eps=eps, weight_decay=weight_decay)
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**settings, "adapt": adapt})

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; `closure` computes the loss again first."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        state["step"] += 1
        first, second = group["betas"]
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.lerp_(gradient, 1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        root = (square / (1 - second ** state["step"])).sqrt().add_(group["eps"])
        update = mean / (1 - first ** state["step"]) / root
        update = update + group["weight_decay"] * parameter
        if group["adapt"]:
            update = update * trust(parameter, update)
        parameter.add_(update, alpha=-group["lr"])


def trust(parameter: Tensor, update: Tensor) -> Tensor:
    """|parameter| / |update|, a scalar; 1 where either is zero."""
    weights, change = parameter.norm(), update.norm()
    known = (weights > 0) & (change > 0)
    return torch.where(known, weights / change, torch.ones_like(weights))
