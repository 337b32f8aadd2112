"""Models as strangers write them, in token ids: layers that are one, numbers that are complex,
ops of one's own, sums spelled as einsum, rows of unequal length."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import meshwright as mw

TOKENS, WIDTH, LENGTH, HEADS = 48, 32, 8, 4
EACH = WIDTH // HEADS

Batch = dict[str, Any]


class Rows(Dataset[Batch]):
    """Token ids, what follows each (-100 beyond the row's length), the length, a class, a name."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> Batch:
        g = torch.Generator().manual_seed(index)
        length = int(torch.randint(2, LENGTH + 1, (), generator=g))
        x, y = torch.randint(0, TOKENS, (2, LENGTH), generator=g)
        y[length:] = -100
        return {"x": x, "y": y, "length": length, "class": index % 3, "name": "row"}


class Straight(torch.autograd.Function):
    """Rounds; the gradient passes, clipped, and reaches the step size too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor) -> Tensor:
        """Multiples of 1/s."""
        ctx.save_for_backward(x, s)
        return torch.round(x * s) / s

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        """Not that of the forward."""
        x, _ = ctx.saved_tensors
        return g * (x.abs() < 2), (g * 0.01 * x).sum()


class Shared(nn.Module):
    """One table three times over, two layers in turn, a dict of results."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.mirrored = nn.Embedding(TOKENS, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.mirrored.weight = self.head.weight = self.table.weight
        self.mix = nn.Linear(WIDTH, WIDTH)
        one, two = (
            nn.Sequential(
                nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2 * WIDTH), act, nn.Linear(2 * WIDTH, WIDTH)
            )
            for act in (nn.GELU(), nn.SiLU())
        )
        self.layers = nn.ModuleList([one, two, one, two])
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: Tensor) -> dict[str, Any]:
        h = self.table(x) + self.mirrored(x.flip(1))
        for layer in self.layers:
            h = h + layer(h)
        return {"logits": self.head(Straight.apply(self.mix(h), self.scale)), "seen": [h, h.mean()]}


@torch.library.custom_op("strange::decay", mutates_args=())
def decay(x: Tensor, a: Tensor) -> Tensor:
    """A sum over time in which the past fades by `a` a step."""
    made = [x[:, 0]]
    for t in range(1, x.shape[1]):
        made.append(a * made[-1] + x[:, t])
    return torch.stack(made, 1)


@torch.library.custom_op("strange::decay_backward", mutates_args=())
def decay_backward(g: Tensor, y: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `decay`."""
    gx, ga, carried = torch.empty_like(g), torch.zeros_like(a), torch.zeros_like(g[:, 0])
    for t in reversed(range(g.shape[1])):
        carried = g[:, t] + a * carried
        gx[:, t] = carried
        if t:
            ga += (carried * y[:, t - 1]).sum(0)
    return gx, ga


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(output, inputs[1])


decay.register_fake(lambda x, a: torch.empty_like(x))
decay_backward.register_fake(lambda g, y, a: (torch.empty_like(g), torch.empty_like(a)))
decay.register_autograd(lambda ctx, g: decay_backward(g, *ctx.saved_tensors), setup_context=_keep)
mw.rule("strange::decay", "b s d, d -> b s d", whole="s")
mw.rule("strange::decay_backward", "b s d, b s d, d -> b s d, d", whole="s", sums="b")


class Fading(nn.Module):
    """An op with a rule of its own; buffers that the forward moves."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up = nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.rate = nn.Parameter(torch.rand(2 * WIDTH))
        self.down, self.head = nn.Linear(2 * WIDTH, WIDTH), nn.Linear(WIDTH, TOKENS)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(2 * WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(self.table(x))
        if self.training:
            self.steps += 1
            self.mean.mul_(0.9).add_(0.1 * h.detach().mean((0, 1)))
        return self.head(self.down(decay(h - self.mean, torch.sigmoid(self.rate))))


class Summed(nn.Module):
    """Attention and a gated layer, every product an einsum over weights of three dims."""

    def __init__(self) -> None:
        super().__init__()

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape) * 0.1)

        self.table, self.head = nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH, TOKENS)
        self.q, self.k = weight(HEADS, WIDTH, EACH), weight(HEADS, WIDTH, EACH)
        self.v, self.o = weight(WIDTH, HEADS, EACH), weight(HEADS, EACH, WIDTH)
        self.up, self.down = weight(WIDTH, 2, 3 * WIDTH), weight(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.table(x)
        q, k = (torch.einsum("btd,hde->bhte", h, w) for w in (self.q, self.k))
        v = torch.einsum("bsd,dhe->bhse", h, self.v)
        a = torch.einsum("bhte,bhse->bhts", q, k) / EACH**0.5
        a = a.masked_fill(~torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(), float("-inf"))
        if mask is not None:
            a = a.masked_fill(~mask[:, None, None, :], -1e9)
        h = h + torch.einsum("bhts,bhse,hed->btd", a.softmax(-1), v, self.o)
        gate, up = torch.einsum("btd,dcf->cbtf", h, self.up).unbind(0)
        return self.head(h + torch.einsum("btf,fd->btd", F.silu(gate) * up, self.down))


@dataclasses.dataclass
class Found:
    """What `Ragged` returns."""

    logits: Tensor
    kind: Tensor


class Ragged(nn.Module):
    """Rows of unequal length: their mean, their largest and their last, by masks."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.kind = Summed(), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Found:
        mask = torch.arange(LENGTH)[None] < lengths[:, None]
        h = self.body.table(x)
        mean = (h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        largest = h.masked_fill(~mask[..., None], -torch.inf).amax(1)
        last = h.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, WIDTH)).squeeze(1)
        return Found(self.body(x, mask), self.kind(mean + largest + last))


class Waves(nn.Module):
    """A filter in frequencies, and attention that turns queries and keys as complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH, TOKENS)
        self.filter = nn.Parameter(torch.randn(LENGTH // 2 + 1, WIDTH, 2) * 0.3)
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        speeds = 10.0 ** -torch.arange(EACH // 2)
        angles = torch.arange(LENGTH).float().outer(speeds)
        self.register_buffer("turn", torch.polar(torch.ones_like(angles), angles))

    def _turned(self, x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.view(-1, LENGTH, HEADS, EACH // 2, 2))
        return torch.view_as_real(pairs * self.turn[None, :, None]).flatten(3).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        waves = torch.fft.rfft(h, dim=1, norm="ortho") * torch.view_as_complex(self.filter)
        h = h + torch.fft.irfft(waves, n=LENGTH, dim=1, norm="ortho")
        q, k = self._turned(self.q(h)), self._turned(self.k(h))
        v = h.view(-1, LENGTH, HEADS, EACH).transpose(1, 2)
        return self.head(h + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ComplexWeights(nn.Module):
    """Parameters that are complex themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH, TOKENS)
        self.one, self.two = (
            nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.cfloat) * 0.2) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        z = torch.fft.fft(self.table(x).to(torch.cfloat), dim=-1) @ self.one
        z = torch.polar(torch.tanh(z.abs()), z.angle()) @ self.two.conj()
        return self.head(z.real + z.imag)


def crossed(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of what follows."""
    return F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-100)


def plain(model: nn.Module, batch: Batch) -> Tensor:
    """Of a model that returns logits."""
    return crossed(model(batch["x"]), batch["y"])


def named(model: nn.Module, batch: Batch) -> Tensor:
    """Of one that returns a dict."""
    found = model(batch["x"])
    return crossed(found["logits"], batch["y"]) + 0.01 * found["seen"][1] ** 2


def masked(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Of one that returns a dataclass; the mean over what counts, by hand."""
    found, counts = model(batch["x"], batch["length"]), batch["y"] != -100
    chosen = F.log_softmax(found.logits, -1).gather(2, batch["y"].clamp(min=0)[..., None])
    loss = -(chosen.squeeze(-1) * counts).sum() / counts.sum()
    return loss + F.cross_entropy(found.kind, batch["class"], label_smoothing=0.1), {
        "tokens": counts.sum()
    }


def strange(model: Callable[[], nn.Module], loss: Any = plain, *, sgd: bool = False) -> mw.Job:
    """Eight rows a step."""

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        if sgd:  # torch's Adam takes no complex gradient that is a conjugate
            return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return torch.optim.AdamW(model.parameters(), lr=1e-2)

    return mw.Job(model=model, loss=loss, optimizer=optimizer, data=Rows, batch_size=8)


def shared() -> mw.Job:
    """See `Shared`."""
    return strange(Shared, named)


def fading() -> mw.Job:
    """See `Fading`."""
    return strange(Fading)


def summed() -> mw.Job:
    """See `Summed`."""
    return strange(Summed)


def ragged() -> mw.Job:
    """See `Ragged`."""
    return strange(Ragged, masked)


def waves() -> mw.Job:
    """See `Waves`."""
    return strange(Waves)


def complex_weights() -> mw.Job:
    """See `ComplexWeights`."""
    return strange(ComplexWeights, sgd=True)


STRANGE: dict[str, Callable[[], mw.Job]] = {
    job.__name__: job for job in (shared, fading, summed, ragged, waves, complex_weights)
}
