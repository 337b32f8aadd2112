"""Odd models: one per thing that tracing or partitioning could get wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.data import Dataset

from meshwright import Job
from tests.equal.parts import (
    WIDTH,
    Attribute,
    Checkpointed,
    ClosedOver,
    Counting,
    InPlace,
    Noise,
    OverTime,
    Recurrent,
    Sampled,
    SelfAttention,
    Shuffled,
    Sorting,
    Straight,
    layer,
)

CLASSES = 5
TIMES = 4
TOKENS = 20
BATCH = 12

Batch = dict[str, Tensor]


class Mixed(Dataset[Batch]):
    """A vector x, a sequence of tokens, an image and a label; weights of loss between 0 and 1."""

    def __init__(self, count: int = 90) -> None:
        g = torch.Generator().manual_seed(3)
        self.columns = {
            "x": torch.randn(count, WIDTH, generator=g),
            "tokens": torch.randint(0, TOKENS, (count, TIMES), generator=g),
            "image": torch.randn(count, 4, 6, 6, generator=g),
            "y": torch.randint(0, CLASSES, (count,), generator=g),
            "mask": (torch.rand(count, TIMES, generator=g) < 0.6).float(),
        }

    def __len__(self) -> int:
        return len(self.columns["x"])

    def __getitem__(self, index: int) -> Batch:
        return {name: column[index] for name, column in self.columns.items()}


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW, with an eps that does not blow rounding up where the true gradient is zero."""
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-6)


def classify(key: str) -> Callable[[nn.Module, Batch], Tensor]:
    """Cross-entropy of what the model makes of one leaf."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[key]), batch["y"])

    return loss


def job(
    model: Callable[[], nn.Module],
    key: str = "x",
    *,
    loss: Callable[..., Any] | None = None,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw,
    batch: int = BATCH,
    **more: Any,
) -> Job:
    """A job on `Mixed`."""
    return Job(model, loss or classify(key), optimizer, Mixed, batch, **more)


class Tied(nn.Module):
    """A language model whose head is its embedding, and one more alias."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(TOKENS, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.token.weight
        self.again = self.mix

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.again(self.mix(self.token(tokens)))))


def next_token(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of the next token."""
    logits = model(batch["tokens"])[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch["tokens"][:, 1:].flatten())


class Plain(nn.Module):
    """Two linears; the hidden layer goes through `middle`."""

    def __init__(self, middle: nn.Module | None = None) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 32)
        self.middle = middle or nn.Identity()
        self.down = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.middle(F.relu(self.up(x))))


class Unused(Plain):
    """A parameter that the loss does not reach, and a module that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Parameter(torch.ones(3, 400))
        self.idle = nn.Linear(WIDTH, WIDTH)


class Frozen(Plain):
    """The first layer is frozen, of the last only the bias is trained."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(32, 32))
        self.up.requires_grad_(requires_grad=False)
        self.down.weight.requires_grad_(requires_grad=False)


class Images(nn.Module):
    """Convolutions around a norm; [B, 4, 6, 6] -> [B, CLASSES]."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = norm
        self.second = nn.Conv2d(8, 8, 3, stride=2, groups=2)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = F.silu(self.norm(self.first(image)))
        return self.head(F.adaptive_avg_pool2d(self.second(x), 1).flatten(1))


class Pixels(nn.Module):
    """Down and up again: a class per pixel, [B, 4, 6, 6] -> [B, CLASSES, 6, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(4, 8, 2, stride=2)
        self.act = nn.PReLU(8)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.shuffle = nn.PixelShuffle(2)
        self.head = nn.Conv2d(2, CLASSES, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.up(self.act(self.down(image)))
        x = self.shuffle(F.interpolate(x, scale_factor=0.5, mode="nearest"))
        return self.head(F.avg_pool2d(x, 3, stride=1, padding=1))


def per_pixel(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of each pixel's class, made from the image; one class does not count."""
    wanted = (batch["image"].sum(1) * 2).long() % CLASSES
    return F.cross_entropy(model(batch["image"]), wanted, ignore_index=1)


class Sequences(nn.Module):
    """Embedded tokens through a sequence layer, averaged; the layout is (B, T, C)."""

    def __init__(
        self, layer: nn.Module, *, first: str = "batch", padding: int | None = None
    ) -> None:
        super().__init__()
        self.token = nn.Embedding(TOKENS, WIDTH, padding_idx=padding)
        self.layer = layer
        self.first = first
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens)
        if self.first == "time":
            x = x.transpose(0, 1)
        x = self.layer(x)
        x = x[0] if isinstance(x, tuple) else x
        return self.head(x.mean(0 if self.first == "time" else 1))


class Hooked(Plain):
    """Hooks on a parameter's gradient, on a module's, and on what a module makes."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(32, 32))
        self.up.weight.register_hook(lambda grad: grad * 0.5)
        self.down.bias.register_hook(lambda grad: grad.clamp(-0.01, 0.01))
        self.middle.register_full_backward_hook(lambda _m, given, _out: (given[0] * 0.3,))
        self.up.register_forward_hook(lambda _m, _given, out: out * 1.1)


class Ragged(Dataset[tuple[Tensor, int]]):
    """Token sequences of 2 to 5."""

    def __len__(self) -> int:
        return 90

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        g = torch.Generator().manual_seed(index)
        return torch.randint(1, TOKENS, (2 + index % 4,), generator=g), index % CLASSES


def padded(samples: list[tuple[Tensor, int]]) -> Batch:
    """Sequences padded to the longest of the batch, so that shapes differ by step and rank."""
    longest = max(len(tokens) for tokens, _ in samples)
    tokens = torch.zeros(len(samples), longest, dtype=torch.int64)
    for row, (sample, _) in enumerate(samples):
        tokens[row, : len(sample)] = sample
    return {"tokens": tokens, "y": torch.tensor([label for _, label in samples])}


def masked(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """A sum over unmasked tokens and their number, with metrics of both forms."""
    logits = model(batch["tokens"])
    each = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["tokens"][:, 1:].flatten(), reduction="none"
    )
    mask = batch["mask"][:, 1:].flatten()
    right = (logits[:, :-1].argmax(-1) == batch["tokens"][:, 1:]).float()
    metrics = {"accuracy": (right.sum(), right.numel()), "level": each.mean()}
    return (each * mask).sum(), mask.sum(), metrics


def regression(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Smooth losses of several kinds, averaged, with a metric."""
    made = model(batch["x"])
    wanted = F.one_hot(batch["y"], CLASSES).to(made.dtype)
    return (
        F.mse_loss(made, wanted)
        + F.l1_loss(made, wanted)
        + F.smooth_l1_loss(made, wanted, beta=0.5)
        + F.huber_loss(made, wanted)
        + F.binary_cross_entropy_with_logits(made, wanted)
        + F.binary_cross_entropy(torch.sigmoid(made), wanted)
        + F.soft_margin_loss(made, 2 * wanted - 1)
        + F.kl_div(F.log_softmax(made, -1), F.softmax(wanted, -1), reduction="batchmean"),
        {"largest": made.abs().max()},
    )


def smoothed(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy with label smoothing, class weights and an ignored class."""
    weight = torch.linspace(0.5, 1.5, CLASSES).to(batch["x"].dtype)
    return F.cross_entropy(
        model(batch["x"]), batch["y"], weight=weight, ignore_index=2, label_smoothing=0.1
    )


def contrast(model: nn.Module, batch: Batch) -> Tensor:
    """Each sample against every other: similarities over the global batch."""
    z = F.normalize(model(batch["x"]), dim=-1)
    return F.cross_entropy(z @ z.t() / 0.5, torch.arange(len(z)))


def half_decayed(model: nn.Module) -> torch.optim.Optimizer:
    """Two groups with settings of their own, Nesterov momentum."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "lr": 0.01}]
    return torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True)


def decay(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Two thirds at each step."""
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.66)


ODD: dict[str, Callable[[], Job]] = {
    "tied weights": lambda: job(Tied, loss=next_token),
    "sum and weight": lambda: job(Tied, loss=masked),
    "unused parameter": lambda: job(Unused),
    "frozen parameters": lambda: job(Frozen),
    "own backward": lambda: job(lambda: Plain(Straight())),
    "in place": lambda: job(lambda: Plain(InPlace())),
    "buffers": lambda: job(lambda: Plain(Counting())),
    "batch norm 1d": lambda: job(lambda: Plain(nn.BatchNorm1d(32))),
    "batch norm 1d, cumulative": lambda: job(lambda: Plain(nn.BatchNorm1d(32, momentum=None))),
    "batch norm 1d, no statistics": lambda: job(
        lambda: Plain(nn.BatchNorm1d(32, track_running_stats=False, affine=False))
    ),
    "batch norm 2d": lambda: job(lambda: Images(nn.BatchNorm2d(8)), "image"),
    "group norm": lambda: job(lambda: Images(nn.GroupNorm(2, 8)), "image"),
    "instance norm": lambda: job(lambda: Images(nn.InstanceNorm2d(8, affine=True)), "image"),
    "pixels": lambda: job(Pixels, loss=per_pixel),
    "spectral norm": lambda: job(lambda: Plain(spectral_norm(nn.Linear(32, 32)))),
    "weight norm": lambda: job(lambda: Plain(weight_norm(nn.Linear(32, 32)))),
    "convolution over time": lambda: job(lambda: Sequences(OverTime()), "tokens"),
    "sorting and scattering": lambda: job(lambda: Plain(Sorting())),
    "checkpoint": lambda: job(lambda: Plain(Checkpointed())),
    "multi-head attention": lambda: job(lambda: Sequences(SelfAttention(weights=False)), "tokens"),
    "multi-head attention, weights": lambda: job(
        lambda: Sequences(SelfAttention(weights=True)), "tokens"
    ),
    "encoder layer": lambda: job(lambda: Sequences(layer(batch_first=True)), "tokens"),
    "time first": lambda: job(lambda: Sequences(layer(), first="time"), "tokens"),
    "padding index": lambda: job(lambda: Sequences(nn.Dropout(0.1), padding=0), "tokens"),
    "lstm": lambda: job(lambda: Sequences(nn.LSTM(WIDTH, WIDTH, batch_first=True)), "tokens"),
    "gru, time first": lambda: job(
        lambda: Sequences(nn.GRU(WIDTH, WIDTH // 2, bidirectional=True), first="time"), "tokens"
    ),
    "gru cell": lambda: job(lambda: Sequences(Recurrent()), "tokens"),
    "tensor attribute": lambda: job(lambda: Plain(Attribute())),
    "noise": lambda: job(lambda: Plain(Noise())),
    "random choices": lambda: job(lambda: Plain(Shuffled())),
    "closed-over tensors": lambda: job(lambda: Plain(ClosedOver())),
    "hooks": lambda: job(Hooked),
    "distributions": lambda: job(lambda: Plain(Sampled())),
    "ragged batches": lambda: Job(
        lambda: Sequences(nn.Dropout(0.1), padding=0),
        classify("tokens"),
        adamw,
        Ragged,
        BATCH,
        collate=padded,
    ),
    "regression losses": lambda: job(Plain, loss=regression),
    "weighted classes": lambda: job(Plain, loss=smoothed),
    "contrast": lambda: job(Plain, loss=contrast),
    "groups, clipping, schedule": lambda: job(
        lambda: Plain(nn.LayerNorm(32)), optimizer=half_decayed, schedule=decay, clip_norm=0.1
    ),
}
