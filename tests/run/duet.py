"""A job with two phases, small: two networks, one against the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim
from torch.utils.data import TensorDataset

import meshwright as mw

BATCH = 12


class Duet(nn.Module):
    """A generator from what comes with each sample, or from noise, and its critic."""

    def __init__(self, *, noisy: bool = False) -> None:
        super().__init__()
        self.noisy = noisy
        self.generator = nn.Sequential(nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 16))
        self.critic = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 1))
        if noisy:
            self.generator.append(nn.Dropout(0.1))

    def made(self, source: Tensor) -> Tensor:
        """[B, 16] of [B, 4]."""
        if self.noisy:
            source = mw.annotate(torch.randn(len(source), 4), "data")
        made: Tensor = self.generator(source)
        return made


def d_loss(model: Duet, batch: Sequence[Tensor]) -> Any:
    """The critic's, and a metric."""
    real, source = batch
    good, bad = model.critic(real), model.critic(model.made(source).detach())
    return F.softplus(-good).mean() + F.softplus(bad).mean(), {"seen": (good > 0).float().mean()}


def g_loss(model: Duet, batch: Sequence[Tensor]) -> Tensor:
    """The generator's."""
    return F.softplus(-model.critic(model.made(batch[1]))).mean()


def phases(**more: Any) -> dict[str, mw.Phase]:
    """Two optimizers of different kinds, one clipped, one with a schedule."""
    return {
        "d": mw.Phase(
            d_loss,
            parameters="critic.*",
            optimizer=lambda model: optim.Adam(model.critic.parameters(), lr=2e-3),
            clip_norm=0.05,
        ),
        "g": mw.Phase(
            g_loss,
            parameters=["generator.0.*", "generator.2.*"],
            optimizer=lambda model: optim.SGD(model.generator.parameters(), lr=0.1, momentum=0.9),
            schedule=lambda optimizer: optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
        ),
        **more,
    }


def points() -> TensorDataset:
    """48 samples."""
    g = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(48, 16, generator=g), torch.randn(48, 4, generator=g))


def duet(*, noisy: bool = False, **changes: Any) -> mw.Job:
    """The job."""
    usual: dict[str, Any] = {
        "model": lambda: Duet(noisy=noisy), "data": points, "batch_size": BATCH,
        "phases": phases(),
    }  # fmt: skip
    return mw.Job(**{**usual, **changes})
