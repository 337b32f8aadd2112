"""Staleness: what a program would freeze without a word is refused.

Tracing turns Python values into constants: a counter that the forward advances, a draw from
Python's or numpy's generators. Each is caught by looking before and after.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import nn

from meshwright.errors import UserCodeError

__all__ = ["no_outside_draws", "python_seeded", "unchanged"]


@contextlib.contextmanager
def python_seeded(seed: int) -> Iterator[None]:
    """Python's and numpy's global generators seeded alike on every rank, and restored."""
    before, before_numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(before)
        np.random.set_state(before_numpy)


@contextlib.contextmanager
def no_outside_draws(seed: int) -> Iterator[None]:
    """Refuse code that draws from Python's or numpy's global generators, started from `seed`.

    Raises:
        UserCodeError: it did.
    """
    with python_seeded(seed):
        before = random.getstate(), _numpy_state()
        yield
        for name, old, new in zip(
            ("Python's random module", "numpy.random"),
            before,
            (random.getstate(), _numpy_state()),
            strict=True,
        ):
            if old != new:
                raise UserCodeError(
                    f"the forward draws from {name}, which a program would freeze to one value; "
                    "draw "
                    "by torch (torch.rand, torch.bernoulli), or use --eager"
                )


def _numpy_state() -> tuple[Any, ...]:
    """numpy's global generator as a value that can be compared."""
    state = np.random.get_state(legacy=False)
    assert isinstance(state, dict)
    inner = state["state"]
    return tuple(inner["key"].tolist()), inner["pos"]


_PLAIN = (bool, int, float, str, type(None))


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Plain attributes of all modules, by path: a program bakes these in."""
    return {
        f"{path}.{name}" if path else name: value
        for path, part in module.named_modules()
        for name, value in vars(part).items()
        if isinstance(value, _PLAIN) and name != "training"
    }


@contextlib.contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Refuse a forward that changes plain attributes: a program would do so once, then never."""
    before = _attributes(module)
    yield
    after = _attributes(module)
    for name, value in after.items():
        if name not in before or before[name] != value:
            old = before.get(name, "nothing")
            raise UserCodeError(
                f"the forward changes {name} from {old!r} to {value!r}, which a program would "
                "freeze;"
                " keep it in a buffer (register_buffer), or use --eager"
            )
