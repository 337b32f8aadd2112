"""LARS: momentum SGD whose rate is scaled layer by layer to the size of weights and gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from meshwright.optim.lamb import trust
from meshwright.optim.settings import require_at_least

__all__ = ["LARS"]


class LARS(torch.optim.Optimizer):
    """You et al. 2017, "Large Batch Training of Convolutional Networks", algorithm 1.

    The rate of a layer is lr * `coefficient` * |w| / (|g| + weight_decay |w|), in the momentum. A
    group with `adapt=False` is stepped by SGD: usual for biases and norms.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        coefficient: float = 1e-3,
        *,
        adapt: bool = True,
    ) -> None:
        """Settings as SGD's, and the paper's trust coefficient.

        Raises:
            ValueError: a setting is negative.
        """
        require_at_least(0, lr=lr, momentum=momentum, weight_decay=weight_decay)
        require_at_least(0, coefficient=coefficient)
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, {**settings, "coefficient": coefficient, "adapt": adapt})

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
            state["momentum_buffer"] = torch.zeros_like(parameter)
        decay = group["weight_decay"]
        update = gradient + decay * parameter
        if group["adapt"]:
            change = gradient.norm() + decay * parameter.norm()
            update = update * (group["coefficient"] * trust(parameter, change))
        buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(update, alpha=group["lr"])
        parameter.sub_(buffer)
