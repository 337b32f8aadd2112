"""Forwards that read conditions; their asserts are as users write them, which pytest's are not."""

from __future__ import annotations

import torch
from torch import nn

from tests.run.jobs import HIDDEN


class Raises(nn.Module):
    def forward(self, x):
        if self.training and x.max() >= 1:
            raise ValueError("tanh is below one")
        return x


class RaisesUnlessAll(nn.Module):
    def forward(self, x):
        if not (x < 1).all():
            why = f"largest is {x}"
            raise ValueError(why)
        return x


class RaisesIfAny(nn.Module):
    def forward(self, x):
        if x is None or (x >= 1).any():
            raise ValueError
        return x


class Asserts(nn.Module):
    def forward(self, x):
        assert x.amin() > -1, "tanh is above minus one"
        return x


class Clamps(nn.Module):
    def forward(self, x):
        if not torch.isfinite(x).all():
            x = x.clamp(-1, 1)
        return x * 2


class Asks(nn.Module):
    """As libraries ask where they know that they are traced."""

    def forward(self, x):
        torch._check_tensor_all(x.sum(-1) < HIDDEN)
        return x
