"""What torch is told while user code is traced, or run as the reference."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.utils.checkpoint

__all__ = ["default_dtype", "straight_checkpoint", "unvalidated"]


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
