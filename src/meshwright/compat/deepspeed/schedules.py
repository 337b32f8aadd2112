"""DeepSpeed's learning-rate schedules, as its configuration names them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch.optim import Optimizer

from meshwright.errors import UsageError, nearest

__all__ = ["KINDS", "Warmup", "schedule_of"]

KINDS = ("WarmupLR", "WarmupDecayLR", "WarmupCosineLR")
_ELSEWHERE = ("OneCycle", "LRRangeTest")


class Warmup:
    """A learning rate that rises, and then stays or falls; stepped after every optimizer step.

    As in DeepSpeed the first step runs before the schedule begins, at its lowest rate.
    """

    def __init__(self, optimizer: Optimizer, rate: Callable[[int, float], float]) -> None:
        """`rate(steps done - 1, the group's own rate)` is a group's rate."""
        self._groups, self._rate = optimizer.param_groups, rate
        self._own = [float(group["lr"]) for group in self._groups]
        self._at = -1
        self._set()

    def step(self) -> None:
        """A step was taken."""
        self._at += 1
        self._set()

    def get_last_lr(self) -> list[float]:
        """Of each group."""
        return [float(group["lr"]) for group in self._groups]

    def state_dict(self) -> dict[str, Any]:
        """Where it is."""
        return {"last_batch_iteration": self._at, "own": self._own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go there."""
        self._at, self._own = state_dict["last_batch_iteration"], list(state_dict["own"])
        self._set()

    def _set(self) -> None:
        for group, own in zip(self._groups, self._own, strict=True):
            group["lr"] = self._rate(self._at, own)


def schedule_of(kind: str, params: Mapping[str, Any]) -> Callable[[Optimizer], Warmup]:
    """The factory for a configuration's `scheduler`.

    Raises:
        UsageError: it is of a kind, or has a parameter, that is not known.
    """
    if kind in _ELSEWHERE:
        raise UsageError(
            f"scheduler type {kind} is not read from a configuration; leave `scheduler` out and "
            "give initialize(lr_scheduler=...) one of torch.optim.lr_scheduler, such as OneCycleLR"
        )
    if kind not in KINDS:
        raise UsageError(f"scheduler.type is {kind!r}; {nearest(kind, KINDS)}")
    allowed = {"warmup_num_steps": 1000, "warmup_type": "log", "last_batch_iteration": -1}
    if kind != "WarmupCosineLR":
        highest = None if kind == "WarmupLR" else 1e-3
        allowed |= {"warmup_min_lr": 0.0, "warmup_max_lr": highest}
    if kind != "WarmupLR":
        allowed["total_num_steps"] = None
    if kind == "WarmupCosineLR":
        allowed |= {"warmup_min_ratio": 0.0, "cos_min_ratio": 1e-4}
    for name, value in params.items():
        if name not in allowed:
            raise UsageError(f"scheduler.params.{name} of {kind}: {nearest(name, tuple(allowed))}")
        _require(name, value)
    values = allowed | dict(params)
    if kind != "WarmupLR" and values["total_num_steps"] is None:
        raise UsageError(f"scheduler.params lacks total_num_steps, which {kind} needs")
    if values["warmup_type"] not in ("log", "linear"):
        raise UsageError(
            f"scheduler.params.warmup_type is {values['warmup_type']!r}; use 'log' or 'linear'"
        )
    rate = partial(_cosine if kind == "WarmupCosineLR" else _linear, values)
    return lambda optimizer: Warmup(optimizer, rate)


def _require(name: str, value: object) -> None:
    whole = name in ("warmup_num_steps", "total_num_steps")
    if name == "warmup_type" or name == "last_batch_iteration":
        return
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or value < int(whole):
        wanted = "a whole number, 1 or more" if whole else "a number, 0 or more"
        raise UsageError(f"scheduler.params.{name} is {value!r}, but must be {wanted}")


def _risen(values: Mapping[str, Any], at: int) -> float | None:
    """How much of the rise is done; None once it is over."""
    steps = max(2, values["warmup_num_steps"])
    if at >= steps:
        return None
    return math.log(at + 1) / math.log(steps) if values["warmup_type"] == "log" else at / steps


def _linear(values: Mapping[str, Any], at: int, own: float) -> float:
    low, high = values["warmup_min_lr"], values["warmup_max_lr"]
    high = own if high is None else high
    if at < 0:
        return float(low)
    share = _risen(values, at)
    total = values.get("total_num_steps")
    if share is None and total is not None:
        left = total - max(2, values["warmup_num_steps"])
        share = max(0.0, (total - at) / max(1.0, left))
    return float(low + (high - low) * (1.0 if share is None else share))


def _cosine(values: Mapping[str, Any], at: int, own: float) -> float:
    if at < 0:
        return 0.0
    share = _risen(values, at)
    if share is not None:
        low = values["warmup_min_ratio"]
        return float(own * (low + (1 - low) * share))
    steps, total, floor = (
        max(2, values["warmup_num_steps"]),
        values["total_num_steps"],
        values["cos_min_ratio"],
    )
    done = min(1.0, (at - steps + 1) / max(1, total - steps))
    return float(own * max(0.0, floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2))
