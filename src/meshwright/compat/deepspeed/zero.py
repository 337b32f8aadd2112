"""`deepspeed.zero`: contexts that scripts build and read models in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["GatheredParameters", "Init"]


@contextmanager
def Init(*_: Any, **__: Any) -> Iterator[None]:  # noqa: N802 - DeepSpeed's name
    """Build the model within: whole on each rank, until the engine frees all but its shards."""
    yield


@contextmanager
def GatheredParameters(*_: Any, **__: Any) -> Iterator[None]:  # noqa: N802 - DeepSpeed's name
    """Before `initialize` parameters are whole; afterwards `engine.module` has them."""
    yield
