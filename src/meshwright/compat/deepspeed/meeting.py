"""Where ranks meet, so that some can read what takes all: `if rank == 0: print(loss.item())`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch

from meshwright.comm.base import Group, all_reduce

__all__ = ["Meeting"]

_MANY: Final = 16
"""Calls of the model, and outputs of one, that can be kept."""


class Meeting:
    """What outputs of the model are kept, which all ranks agree on whenever they meet.

    Attributes:
        kept: (which call of the model, which of its tensors), the same on all ranks.
        wanted: what this rank would have kept as well.
    """

    def __init__(self, ranks: int) -> None:
        self.kept: frozenset[tuple[int, int]] = frozenset()
        self.wanted: set[tuple[int, int]] = set()
        self._group = Group.world(ranks)

    def hold(self, perform: Callable[[Any], Any], *, reading: bool, busy: bool) -> bool:
        """Meet the others; whether any of them reads something.

        Args:
            perform: has a driver go through an exchange.
            reading: this rank does.
            busy: it has begun a step whose outputs to keep are settled.
        """
        told = torch.zeros(2 + _MANY * _MANY, dtype=torch.float64)
        told[0], told[1] = reading, busy
        for turn, place in self.wanted:
            if max(turn, place) < _MANY:
                told[2 + turn * _MANY + place] = 1
        found = perform(all_reduce(told, self._group, label="values read early"))
        readers, begun, *wanted = found.tolist()
        if not readers or not begun:  # no step is between its first micro-batch and its last
            self.kept |= {divmod(at, _MANY) for at, asked in enumerate(wanted) if asked}
            self.wanted.clear()
        return bool(readers)
