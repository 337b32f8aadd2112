"""Shampoo: a gradient matrix between inverse roots of its rows' and columns' second moments."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from meshwright.optim.settings import require_at_least

__all__ = ["Shampoo", "inverse_root"]


class Shampoo(torch.optim.Optimizer):
    """Gupta et al. 2018, "Shampoo: Preconditioned Stochastic Tensor Optimization", algorithm 1.

    Tensors of more dims are matrices (dim 0, the others). A side longer than `largest` is left as
    it is, and the other side takes the whole root; vectors are stepped by diagonal Adagrad.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        eps: float = 1e-4,
        every: int = 1,
        largest: int = 1024,
    ) -> None:
        """`every`: steps between new roots; `eps`: of the identity that moments begin with.

        Raises:
            ValueError: a setting is negative, or `every` below 1.
        """
        require_at_least(0, lr=lr, momentum=momentum, weight_decay=weight_decay, eps=eps)
        require_at_least(1, every=every, largest=largest)
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eps": eps}
        super().__init__(params, {**settings, "every": every, "largest": largest})

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
            state["momentum_buffer"] = torch.zeros_like(parameter)
        if group["weight_decay"] != 0:
            gradient = gradient + group["weight_decay"] * parameter
        if gradient.dim() < 2:
            update = self._scaled(gradient, state, group)
        else:
            matrix = gradient.reshape(gradient.shape[0], -1)
            update = self._between_roots(matrix, state, group).reshape(gradient.shape)
        state["step"] += 1
        buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(update)
        parameter.add_(buffer, alpha=-group["lr"])

    def _scaled(self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        if "diagonal" not in state:
            state["diagonal"] = torch.full_like(gradient, group["eps"])
        state["diagonal"].addcmul_(gradient, gradient)
        root: Tensor = state["diagonal"].sqrt()
        return gradient / root

    def _between_roots(
        self, matrix: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> Tensor:
        sides = [
            side
            for side, size in (("rows", matrix.shape[0]), ("columns", matrix.shape[1]))
            if size <= group["largest"]
        ]
        for side in sides:
            one = matrix if side == "rows" else matrix.T
            if side not in state:
                identity = torch.eye(one.shape[0], dtype=one.dtype, device=one.device)
                state[side] = group["eps"] * identity
            state[side].add_(one @ one.T)
            if state["step"] % group["every"] == 0:
                state[f"{side}_root"] = inverse_root(state[side], 2 * len(sides), group["eps"])
        if "rows" in sides:
            matrix = state["rows_root"] @ matrix
        return matrix @ state["columns_root"] if "columns" in sides else matrix


def inverse_root(moments: Tensor, power: int, least: float) -> Tensor:
    """moments^(-1/power) of a symmetric matrix whose eigenvalues are `least` or more."""
    values, vectors = torch.linalg.eigh(moments)
    root: Tensor = (vectors * values.clamp(min=least).pow(-1 / power)) @ vectors.T
    return root
