"""What torch is told while user code is traced, or run as the reference."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any
from unittest import mock

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

__all__ = [
    "checkpoint_region",
    "default_dtype",
    "in_dtype",
    "recast",
    "straight_checkpoint",
    "unvalidated",
]

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


_REGION: ContextVar[tuple[int, int]] = ContextVar("region", default=(0, 0))
"""The checkpoint region that runs now, and how many there were."""


def checkpoint_region() -> int:
    """The number of the `torch.utils.checkpoint` region that runs now; 0 outside of all."""
    return _REGION.get()[0]


@contextlib.contextmanager
def _region() -> Iterator[None]:
    """A region, numbered in the order of a trace; one inside another is part of that."""
    inside, seen = _REGION.get()
    if inside:
        yield
        return
    _REGION.set((seen + 1, seen + 1))
    try:
        yield
    finally:
        _REGION.set((0, seen + 1))


@contextlib.contextmanager
def straight_checkpoint() -> Iterator[None]:
    """`torch.utils.checkpoint` in user code runs straight through: remat is the plan's business.

    Its regions are numbered meanwhile, for `remat=marks`.
    """

    def around(*_: Any, **__: Any) -> Iterator[None]:
        """What torch steps once before the function and once after it."""
        with _region():
            yield

    # User code has imported `checkpoint` by name; what it calls inside is looked up at each call.
    inside = torch.utils.checkpoint
    token = _REGION.set((0, 0))
    try:
        with (
            mock.patch.object(inside, "_checkpoint_without_reentrant_generator", around),
            mock.patch.object(inside, "CheckpointFunction", _Straight),
        ):
            yield
    finally:
        _REGION.reset(token)


def unvalidated() -> contextlib.AbstractContextManager[object]:
    """torch.distributions check their parameters by reading them, which no trace can."""
    return mock.patch.object(torch.distributions.Distribution, "_validate_args", new=False)


class _Straight:
    """In place of torch's reentrant checkpoint function: calls and forgets nothing."""

    @staticmethod
    def apply(function: Callable[..., Any], _preserve: bool, *args: Any) -> Any:  # noqa: FBT001 - torch's signature
        with _region():
            return function(*args)
