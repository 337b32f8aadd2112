"""A job of some hundred MiB, for limits of memory; `greedy` takes more than can be foretold."""

from __future__ import annotations

import torch
from torch import nn

from meshwright import Job


class Deep(nn.Module):
    """Wide layers that repeat."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = torch.nn.functional.gelu(layer(x))
        return x


class Rows(torch.utils.data.Dataset):
    """A row for every number."""

    def __init__(self, width: int) -> None:
        self.width = width

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index):
        return torch.full((self.width,), index / 4096)


class Greedy(torch.optim.AdamW):
    """Takes 64 GiB at its second step."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if self.state[parameter]:
                    torch.ones(2**34)
        return super().step(closure)


def job(width: int = 1024, depth: int = 8, batch: int = 1024, greedy: bool = False) -> Job:
    """By default 32 MiB of weights, 96 of gradients and moments, and 64 of activations."""
    kind = Greedy if greedy else torch.optim.AdamW
    return Job(
        model=lambda: Deep(width, depth),
        loss=lambda model, batch: model(batch).square().mean(),
        optimizer=lambda model: kind(model.parameters()),
        data=lambda: Rows(width),
        batch_size=batch,
        steps=3,
    )
