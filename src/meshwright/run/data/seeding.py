"""Python's, numpy's and torch's own generators: seed, compare, and put back as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Generators", "put_back", "seed_generators"]


@dataclass(frozen=True, slots=True, eq=False)
class Generators:
    """The states of the three generators that user code draws from without naming one."""

    python: tuple[Any, ...]
    numpy: dict[str, Any]
    torch: Tensor

    @classmethod
    def read(cls) -> Generators:
        """The states as they are now (the CPU's only)."""
        return cls(
            random.getstate(),
            np.random.get_state(legacy=False),  # noqa: NPY002 - the one that users' code draws from
            torch.default_generator.get_state(),
        )

    def write(self) -> None:
        """Make these the current states."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002 - as above
        torch.default_generator.set_state(self.torch)

    def same(self, other: Generators) -> bool:
        """Whether no generator drew between the two."""
        return self.same_python(other) and torch.equal(self.torch, other.torch)

    def same_python(self, other: Generators) -> bool:
        """Whether neither Python's nor numpy's drew between the two."""
        mine, yours = self.numpy, other.numpy
        return (
            self.python == other.python
            and mine["state"]["pos"] == yours["state"]["pos"]
            and mine["has_gauss"] == yours["has_gauss"]
            and bool(np.array_equal(mine["state"]["key"], yours["state"]["key"]))
        )


def seed_generators(seed: int) -> None:
    """Seed all three with a number of at most 63 bits.

    torch's is seeded through its CPU generator, because `torch.manual_seed` would also reseed the
    accelerators, whose draws belong to the model.
    """
    random.seed(seed)
    np.random.seed([seed >> 32, seed & 0xFFFFFFFF])  # noqa: NPY002 - as above
    torch.default_generator.manual_seed(seed)


@contextmanager
def put_back() -> Iterator[None]:
    """Leave the generators as they were found, however the block ends."""
    before = Generators.read()
    try:
        yield
    finally:
        before.write()
