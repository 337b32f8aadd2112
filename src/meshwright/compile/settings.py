"""What torch is told while user code is traced, or run as the reference."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

__all__ = ["default_dtype", "in_dtype", "recast", "straight_checkpoint", "unvalidated"]

_COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}


def in_dtype(kind: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """What a tensor of `kind` becomes where floating ones are `wanted`: complex ones follow."""
    if wanted is not None and kind.is_complex:
        return _COMPLEX.get(wanted, kind)
    return wanted if wanted is not None and kind.is_floating_point else kind


def recast(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters, buffers and plain tensor attributes of floating and complex kind."""
    # `model.to` makes complex tensors real.
    model._apply(lambda tensor: tensor.to(in_dtype(tensor.dtype, dtype)))  # noqa: SLF001
    for part in model.modules():
        for name, value in vars(part).items():
            if isinstance(value, Tensor):
                setattr(part, name, value.to(in_dtype(value.dtype, dtype)))


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """torch's default floating dtype, where one is given, and restored."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def straight_checkpoint() -> Iterator[None]:
    """`torch.utils.checkpoint` in user code runs straight through: remat is the plan's business."""

    def around(*_: Any, **__: Any) -> Iterator[None]:
        """What torch steps once before the function and once after it."""
        yield

    # User code has imported `checkpoint` by name; what it calls inside is looked up at each call.
    inside = torch.utils.checkpoint
    with (
        mock.patch.object(inside, "_checkpoint_without_reentrant_generator", around),
        mock.patch.object(inside, "CheckpointFunction", _Straight),
    ):
        yield


def unvalidated() -> contextlib.AbstractContextManager[object]:
    """torch.distributions check their parameters by reading them, which no trace can."""
    return mock.patch.object(torch.distributions.Distribution, "_validate_args", new=False)


class _Straight:
    """In place of torch's reentrant checkpoint function: calls and forgets nothing."""

    @staticmethod
    def apply(function: Callable[..., Any], _preserve: bool, *args: Any) -> Any:  # noqa: FBT001 - torch's signature
        return function(*args)
