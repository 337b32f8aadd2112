"""What a loss may return, brought to one form: a sum, its weight, and metrics as such pairs."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from meshwright.errors import UserCodeError

__all__ = ["RESERVED", "normalise"]

RESERVED = frozenset(
    ("step", "loss", "lr", "samples", "seconds", "time", "gradient_norm", "evaluation", "note")
) | {"adascale_gain", "adascale_iterations", "loss_scale", "phase"}
"""Names that records of a run keep for themselves."""


def normalise(found: Any, samples: int) -> tuple[Tensor, Any, dict[str, tuple[Any, Any]]]:
    """What a loss returned, as (sum, weight, metrics as (sum, weight)).

    Raises:
        UserCodeError: the loss is no scalar, or of another form.
    """
    metrics: Mapping[str, Any] = {}
    if isinstance(found, tuple) and len(found) >= 2 and isinstance(found[-1], Mapping):
        metrics, found = found[-1], found[:-1]
        found = found[0] if len(found) == 1 else found
    if isinstance(found, tuple) and len(found) == 2:
        total, weight = map(_wide, found)
        _require_scalar("the loss's sum", total)
        _require_number("the loss's weight", weight)
    else:
        _require_scalar("the loss", found)
        total, weight = _wide(found) * samples, samples
    return total, weight, {name: _metric(name, m, samples) for name, m in metrics.items()}


def _metric(name: str, metric: Any, samples: int) -> tuple[Any, Any]:
    if name in RESERVED:
        raise UserCodeError(
            f"the loss returns a metric {name!r}, a name that records keep for themselves; give it "
            "another name"
        )
    if isinstance(metric, tuple) and len(metric) == 2:
        for part in metric:
            _require_number(f"metric {name!r}", part)
        return _wide(metric[0]), _wide(metric[1])
    _require_number(f"metric {name!r}", metric)
    return _wide(metric) * samples, samples


def _wide(value: Any) -> Any:
    """Sums over samples are not kept in 16 bits."""
    short = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if short else value


def _require_number(what: str, value: Any) -> None:
    if isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1):
        return
    is_ = f"has shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"is {_kind(value)}"
    raise UserCodeError(
        f"{what} {is_}, but must be a scalar or (sum, weight) of scalars; take its mean or sum"
    )


def _kind(value: Any) -> str:
    return type(value).__name__


def _require_scalar(what: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise UserCodeError(
            f"{what} is {_kind(value)}, but must be a scalar tensor, or (sum, weight); "
            "return the loss from loss(model, batch)"
        )
    if value.numel() != 1:
        raise UserCodeError(
            f"{what} has shape {tuple(value.shape)}, but must be a scalar; take its mean, or return"
            " (sum, weight)"
        )
    if not value.is_floating_point():
        raise UserCodeError(f"{what} is {value.dtype}, but must be floating point")
