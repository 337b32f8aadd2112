"""Models that are odd to cut: parts without parameters, parts that share, edges that jump."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshwright import Job
from tests.equal.odd import CLASSES, Batch, Plain, Tied, job, masked
from tests.equal.parts import WIDTH, Counting


class Sums(nn.Module):
    """Running sums over time: no parameter, too much work to be done twice."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x.cumsum(-1))


class Chain(nn.Module):
    """One part after the other, by name: `parts.0` and so on."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


def linear(given: int = WIDTH, made: int = WIDTH) -> nn.Module:
    """A linear and a nonlinearity."""
    return nn.Sequential(nn.Linear(given, made), nn.GELU())


def bare_ends() -> nn.Module:
    """Neither the first part nor the last has parameters."""
    return Chain(Sums(), linear(), linear(WIDTH, CLASSES), Sums())


def bare_middle() -> nn.Module:
    """The part in the middle has no parameters."""
    return Chain(linear(), Sums(), linear(WIDTH, CLASSES))


def frozen() -> nn.Module:
    """The first part is frozen, so that no gradient leaves the second; of the third only a bias."""
    made = Chain(linear(), linear(), linear(), nn.Linear(WIDTH, CLASSES))
    made.parts[0].requires_grad_(requires_grad=False)
    made.parts[2].get_parameter("0.weight").requires_grad_(requires_grad=False)
    return made


def frozen_end() -> nn.Module:
    """The last part is frozen: its stage makes gradients of what it is given alone."""
    made = Chain(linear(), linear(), nn.Linear(WIDTH, CLASSES))
    made.parts[2].requires_grad_(requires_grad=False)
    return made


class Reads(nn.Module):
    """Multiplies by a weight that others read too; detached, it gives that weight no gradient."""

    def __init__(self, shared: nn.Linear, *, detached: bool = False) -> None:
        super().__init__()
        self.shared = shared
        self.own = nn.Linear(WIDTH, WIDTH)
        self.detached = detached

    def forward(self, x: Tensor) -> Tensor:
        weight = self.shared.weight.detach() if self.detached else self.shared.weight
        return torch.tanh(F.linear(self.own(x), weight))


def thrice(*, detached: int | None = None) -> nn.Module:
    """One weight read in three parts, and the gradient of one use left out if said so."""
    shared = nn.Linear(WIDTH, WIDTH, bias=False)
    parts = [Reads(shared, detached=k == detached) for k in range(3)]
    return Chain(*parts, nn.Linear(WIDTH, CLASSES))


class Scaled(nn.Module):
    """A buffer that each forward changes and reads, and the backward reads as it was then."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("scale", torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.own(x)
        if self.training:
            with torch.no_grad():
                self.scale.mul_(0.7).add_(x.detach().abs().mean(0), alpha=0.3)
        return x * self.scale


def buffers() -> nn.Module:
    """Buffers that change in every stage."""
    return Chain(
        linear(WIDTH, 32), Counting(), linear(32, WIDTH), Scaled(), nn.Linear(WIDTH, CLASSES)
    )


class Shared(nn.Module):
    """A buffer that two stages read and none changes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = linear(), nn.Linear(WIDTH, CLASSES)
        self.register_buffer("table", torch.linspace(0.5, 1.5, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.first(x * self.table) * self.table.cumsum(0))
        return found


def counted_twice() -> nn.Module:
    """One part that changes its buffers, applied at two stages."""
    again = Counting()
    return Chain(linear(WIDTH, 32), again, linear(32, 32), again, nn.Linear(32, CLASSES))


def early(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Any]]:
    """A metric of what the first part makes, one of the batch alone, one of the end."""
    assert isinstance(model, Plain)
    hidden = F.relu(model.up(batch["x"]))
    level = hidden.detach().abs().mean()
    made = model.down(model.middle(hidden))
    right = (made.argmax(-1) == batch["y"]).float()
    metrics = {"level": level, "even": (batch["y"] % 2 == 0).float().mean(),
               "right": (right.sum(), right.numel())}  # fmt: skip
    return F.cross_entropy(made, batch["y"]), metrics


def two_losses(model: nn.Module, batch: Batch) -> Tensor:
    """What the first part makes has a loss of its own, beside that at the end."""
    assert isinstance(model, Plain)
    hidden = F.relu(model.up(batch["x"]))
    aside = hidden.square().mean()
    return F.cross_entropy(model.down(model.middle(hidden)), batch["y"]) + 0.1 * aside


class Jump(nn.Module):
    """What each part makes is read by a later one than the next."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([linear() for _ in range(3)])
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        first = self.parts[0](x)
        aside = self.parts[1](x)
        third = self.parts[2](first)
        found: Tensor = self.last(third + first + aside)
        return found


def middle() -> nn.Module:
    """Two linears with a third between."""
    return Plain(nn.Linear(32, 32))


STAGED: dict[str, tuple[Callable[[], Job], tuple[str, ...]]] = {
    "no parameters at the ends": (lambda: job(bare_ends), ("parts.1", "parts.3")),
    "no parameters in the middle": (lambda: job(bare_middle), ("parts.1", "parts.2")),
    "frozen parameters": (lambda: job(frozen), ("parts.1", "parts.2", "parts.3")),
    "a frozen end": (lambda: job(frozen_end), ("parts.1", "parts.2")),
    "a weight at three stages": (lambda: job(thrice), ("parts.1", "parts.2")),
    "a use without a gradient, first": (
        lambda: job(lambda: thrice(detached=0)),
        ("parts.1", "parts.2"),
    ),
    "a use without a gradient, last": (
        lambda: job(lambda: thrice(detached=2)),
        ("parts.1", "parts.2"),
    ),
    "buffers": (lambda: job(buffers), ("parts.1", "parts.2", "parts.4")),
    "a buffer at two stages": (lambda: job(Shared), ("last",)),
    "metrics of an early stage": (lambda: job(middle, loss=early), ("middle", "down")),
    "a loss at an early stage": (lambda: job(middle, loss=two_losses), ("middle", "down")),
    "a sum and a weight": (lambda: job(Tied, loss=masked), ("mix", "head")),
    "a jump": (lambda: job(Jump), ("parts.1", "parts.2", "last")),
    "clipped": (lambda: job(thrice, clip_norm=0.1), ("parts.1", "parts.2")),
}
"""Job and the modules at which stages begin."""

__all__ = ["STAGED", "counted_twice"]
