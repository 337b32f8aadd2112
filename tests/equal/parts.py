"""Parts that odd models are made of; each keeps the form of what it is given."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH = 16


class Rounded(torch.autograd.Function):
    """Rounds forward; its own backward lets the gradient straight through, clipped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.round(x * 4) / 4

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (x.abs() < 1).to(grad.dtype)


class Straight(nn.Module):
    """Applies `Rounded`."""

    def forward(self, x: Tensor) -> Tensor:
        return Rounded.apply(x)


class InPlace(nn.Module):
    """Changes activations in place, through views and masks too."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        x.mul_(1.5).add_(0.1)
        x[:, :4].zero_()
        x[:, 4] += x[:, 5]
        x.masked_fill_(x > 2, 2.0)
        part = x.view(len(x), 4, 8)
        part[:, 1].clamp_(max=1.0)
        F.relu_(x)
        return x


class Counting(nn.Module):
    """Buffers updated in the forward: a counter, a mean over samples that is also read."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(32))
        self.register_buffer("spread", torch.ones(32), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += 1
            with torch.no_grad():
                self.mean.lerp_(x.detach().mean(0), 0.1)
                self.spread = 0.9 * self.spread + 0.1 * x.detach().var(0)
        return (x - self.mean) / (self.spread + 1) * torch.log(self.seen + 1.0)


class Checkpointed(nn.Module):
    """`torch.utils.checkpoint` around a part with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Dropout(0.2))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


class OverTime(nn.Module):
    """A 1-d convolution, pooling, RMS norm and a cumulative sum over (B, T, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=2, dilation=2)
        self.norm = nn.RMSNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool1d(F.elu(self.conv(x.transpose(1, 2))), 2).transpose(1, 2)
        return self.norm(y).cumsum(1) + torch.einsum("btc,bsc->bs", x, y)[:, :, None]


class Sorting(nn.Module):
    """The largest features, put back in their places, beside sorted and scattered ones."""

    def forward(self, x: Tensor) -> Tensor:
        values, places = x.topk(5, dim=-1)
        kept = torch.zeros_like(x).scatter(1, places, values.exp())
        order = x.detach().argsort(-1)
        ranked = x.gather(1, order).cumsum(-1).flip(-1)
        added = torch.zeros_like(x).index_add(1, torch.arange(32) % 4, x)
        return kept + 0.1 * ranked + torch.where(x > 0, added, x.roll(1, -1)).tril()


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` of x with itself, causal."""

    def __init__(self, *, weights: bool) -> None:
        super().__init__()
        self.weights = weights
        self.attend = nn.MultiheadAttention(WIDTH, 4, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1]).to(x.dtype)
        return self.attend(x, x, x, attn_mask=mask, need_weights=self.weights)[0]


class Attribute(nn.Module):
    """A tensor that is neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.linspace(0.5, 1.5, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.table


class Noise(nn.Module):
    """Noise made in the forward: per sample, and one draw shared by all samples."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        shared = torch.rand(x.shape[1])
        return x * (1 + 0.1 * torch.randn_like(x)) + 0.1 * torch.rand(x.shape) + 0.1 * shared


class Shuffled(nn.Module):
    """Dropout of whole channels, and integers drawn per sample as an index."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout1d(0.2)
        self.table = nn.Embedding(7, 32)

    def forward(self, x: Tensor) -> Tensor:
        picked = torch.randint(0, 7, (len(x),))
        return self.drop(x.view(len(x), 8, 4)).reshape(len(x), 32) + self.table(picked)


GLOBAL = torch.linspace(0.5, 1.5, 32)


class ClosedOver(nn.Module):
    """Tensors that are nobody's state: of the module's file, in a list, literals."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = [torch.linspace(0, 1, 32), torch.rand(32)]

    def forward(self, x: Tensor) -> Tensor:
        x = x * GLOBAL + self.tables[0] * self.tables[1]
        return x * torch.tensor(0.5) + torch.tensor([1.0, 2.0]).repeat(16) + torch.as_tensor(3)


class Sampled(nn.Module):
    """A reparameterised draw from a distribution, and a Gumbel softmax."""

    def forward(self, x: Tensor) -> Tensor:
        drawn = torch.distributions.Normal(x, 0.1 + x.abs()).rsample()
        return drawn + F.gumbel_softmax(x, hard=True)


def layer(**more: Any) -> nn.Module:
    """A transformer encoder layer with dropout."""
    return nn.TransformerEncoderLayer(WIDTH, 4, 32, dropout=0.1, **more)


class Recurrent(nn.Module):
    """A cell stepped by the user's own loop over time."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.zeros_like(x[:, 0])
        states = []
        for time in range(x.shape[1]):
            hidden = self.cell(x[:, time], hidden)
            states.append(hidden)
        return torch.stack(states, 1)
