"""The optimizers that a DeepSpeed configuration names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from meshwright.errors import UsageError, nearest
from meshwright.optim import LAMB

__all__ = ["built", "cpu_adam"]

_ADAM = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
_KNOWN: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Any]]] = {
    "adam": (torch.optim.AdamW, {**_ADAM, "amsgrad": False}),
    "adamw": (torch.optim.AdamW, {**_ADAM, "amsgrad": False}),
    "lamb": (LAMB, _ADAM),
    "sgd": (
        torch.optim.SGD,
        {"lr": 1e-3, "momentum": 0.0, "weight_decay": 0.0, "dampening": 0.0, "nesterov": False},
    ),
    "adagrad": (torch.optim.Adagrad, {"lr": 1e-2, "eps": 1e-10, "weight_decay": 0.0}),
}
"""What each name makes, and its settings by default: DeepSpeed's, which decay no weights."""
_KERNELS = (
    "torch_adam",
    "adam_w_mode",
    "bias_correction",
    "fp32_optimizer_states",
    "fused",
    "adamw_mode",
)
_COMPRESSED = ("onebitadam", "onebitlamb", "zerooneadam")
NAMES = ("Adam", "AdamW", "Lamb", "SGD", "Adagrad")


def built(kind: str, params: Mapping[str, Any], over: Iterable[Any]) -> torch.optim.Optimizer:
    """The optimizer that `optimizer` of a configuration names, over parameters or groups.

    `Adam` decays weights as AdamW does unless `adam_w_mode` is false, as in DeepSpeed.

    Raises:
        UsageError: it is not known, or has a setting that is not.
    """
    name = kind.lower()
    if name in _COMPRESSED:
        raise UsageError(
            f"optimizer.type {kind} compresses what it sends, which changes the numbers; use Adam "
            "or Lamb"
        )
    if name not in _KNOWN:
        raise UsageError(
            f"optimizer.type is {kind!r}; {nearest(kind, NAMES)}; or give "
            "initialize(optimizer=...) one of your own, of any class"
        )
    make, defaults = _KNOWN[name]
    if name == "adam" and params.get("adam_w_mode", True) is False:
        make = torch.optim.Adam
    if params.get("bias_correction", True) is False:
        raise UsageError("optimizer.params.bias_correction is false, which torch's Adam cannot do")
    own = {key: value for key, value in params.items() if key not in _KERNELS}
    for key in own:
        if key not in defaults:
            raise UsageError(f"optimizer.params.{key} of {kind}: {nearest(key, tuple(defaults))}")
    values = {**defaults, **own}
    if "betas" in values:
        values["betas"] = tuple(values["betas"])
    try:
        return make(list(over), **values)
    except (TypeError, ValueError) as error:
        raise UsageError(f"optimizer.params of {kind}: {error}") from None


def cpu_adam(model_params: Iterable[Any], lr: float = 1e-3, betas: Any = (0.9, 0.999),
             eps: float = 1e-8, weight_decay: float = 0.0, *, adamw_mode: bool = True,
             **_: Any) -> torch.optim.Optimizer:  # fmt: skip
    """In place of `DeepSpeedCPUAdam` and `FusedAdam`: torch's, stepped where its state rests."""
    kind = torch.optim.AdamW if adamw_mode else torch.optim.Adam
    return kind(list(model_params), lr=lr, betas=tuple(betas), eps=eps, weight_decay=weight_decay)
