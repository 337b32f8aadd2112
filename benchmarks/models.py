"""The models, data and optimizer that every contestant trains, in plain torch.

`gpt10m` is reference/bench/gpt.py's: 10.3 M parameters, context 256. Weights and batches come from
files and seeds that all contestants share, so that their losses can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

BATCHES = 4  # trained on in turn, so that the loss falls
LR = 3e-4


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a GPT."""

    width: int
    heads: int
    depth: int
    context: int
    vocabulary: int = 512


SHAPES = {
    "gpt10m": Shape(320, 4, 8, 256),
    "gpt60m": Shape(768, 12, 8, 256, 2048),
    "gpt100k": Shape(64, 2, 1, 64, 256),
}


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        d = shape.width
        self.heads = shape.heads
        self.ln1, self.ln2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.q, self.k, self.v = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.o = nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        h = self.ln1(x_BTD)
        q, k, v = (
            f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.dropout(self.o(mixed.transpose(1, 2).flatten(2)))
        return x_BTD + self.dropout(self.down(F.gelu(self.up(self.ln2(x_BTD)))))


class Embed(nn.Module):
    """Of tokens and positions."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self.tok = nn.Embedding(shape.vocabulary, shape.width)
        self.pos = nn.Embedding(shape.context, shape.width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids_BT: Tensor) -> Tensor:
        positions_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        return self.dropout(self.tok(ids_BT) + self.pos(positions_T))


class Head(nn.Module):
    """Logits."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(shape.width)
        self.out = nn.Linear(shape.width, shape.vocabulary)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.out(self.ln(x_BTD))


def model(name: str, dropout: float = 0.0) -> nn.Sequential:
    """A model of `SHAPES`."""
    return of(SHAPES[name], dropout)


def of(shape: Shape, dropout: float = 0.0) -> nn.Sequential:
    """A GPT, a flat list of layers."""
    blocks = [Block(shape, dropout) for _ in range(shape.depth)]
    return nn.Sequential(Embed(shape, dropout), *blocks, Head(shape))


def stages(whole: nn.Sequential, count: int) -> list[nn.Sequential]:
    """As many blocks in each; the embedding goes with the first, the head with the last."""
    first, *blocks, last = whole
    each, rest = divmod(len(blocks), count)
    assert not rest
    parts = [blocks[k * each : (k + 1) * each] for k in range(count)]
    parts[0], parts[-1] = [first, *parts[0]], [*parts[-1], last]
    return [nn.Sequential(*part) for part in parts]


def loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean cross-entropy per token."""
    return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())


def optimizer(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    """The same kernel for all."""
    return torch.optim.AdamW(parameters, lr=LR, fused=True)


def batches(name: str, rows: int) -> list[tuple[Tensor, Tensor]]:
    """The global batches, `rows` sequences each: tokens and targets [rows, context] int64."""
    shape, found = SHAPES[name], []
    for seed in range(BATCHES):
        generator = torch.Generator().manual_seed(seed)
        size = (rows, shape.context + 1)
        ids = torch.randint(0, shape.vocabulary, size, generator=generator)
        found.append((ids[:, :-1].contiguous(), ids[:, 1:].contiguous()))
    return found


def samples(name: str, rows: int) -> list[tuple[Tensor, ...]]:
    """The same, sample by sample."""
    return [pair for both in batches(name, rows) for pair in zip(*both, strict=True)]


def rows_of(pairs: list[tuple[Tensor, Tensor]], rank: int, world: int) -> list[tuple]:
    """A rank's rows of global batches."""
    return [tuple(t.chunk(world)[rank].contiguous() for t in pair) for pair in pairs]


def save_weights(name: str, path: Path) -> None:
    """The initial weights that all contestants load."""
    torch.manual_seed(0)
    save_file(model(name).state_dict(), path)


def loaded(name: str, weights: str, dropout: float = 0.0) -> nn.Sequential:
    """A model with the common weights."""
    built = model(name, dropout)
    built.load_state_dict(load_file(weights))
    return built
