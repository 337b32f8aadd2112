"""`watch("name", tensor)`: look at a tensor inside a traced forward, without disturbing it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

from torch import Tensor

__all__ = ["Watched", "watch", "watching"]


@dataclass(slots=True)
class Watched:
    """What a forward showed, by name."""

    found: dict[str, Tensor] = field(default_factory=dict)


_CURRENT: ContextVar[Watched | None] = ContextVar("watched", default=None)


def watch(name: str, tensor: Tensor) -> Tensor:
    """Show `tensor` to the loop around the model; returns it unchanged.

    Inside a run its global value arrives as `metrics.watched[name]`, once per step (of the last
    micro-batch); where a forward shows a name again, as `name#2`. With `--eager` each rank sees the
    value of its own samples. Outside a run it does nothing.
    """
    watched = _CURRENT.get()
    if watched is not None:
        times = sum(known.partition("#")[0] == name for known in watched.found)
        watched.found[f"{name}#{times + 1}" if times else name] = tensor
    return tensor


@contextlib.contextmanager
def watching(watched: Watched) -> Iterator[None]:
    """Collect what is shown meanwhile."""
    token = _CURRENT.set(watched)
    try:
        yield
    finally:
        _CURRENT.reset(token)
