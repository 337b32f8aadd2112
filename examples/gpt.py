"""A byte-level GPT that learns the source code of Python's own library.

    mw train examples/gpt.py --set depth=6 --set width=256
    mw train examples/gpt.py -n 2 --plan zero3

Nothing to download: the corpus is the standard library of the Python that runs this file. The model
knows nothing of devices, ranks or plans.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

import meshwright as mw

VOCABULARY = 256  # one token per byte
CORPUS_BYTES = 32_000_000
HELD_OUT_EVERY = 20  # one file in twenty is never trained on
HELD_OUT_WINDOWS = 256
SUFFIXES = {".py", ".txt", ".rst"}


# Shapes: B samples, T bytes of context, W width, H heads.
class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width, bias=False)  # softmax would cancel a bias
        self.v = nn.Linear(width, width)
        self.o = nn.Linear(width, width)

    def forward(self, x_BTW: Tensor) -> Tensor:
        q, k, v = (
            f(x_BTW).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.o(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linears around a GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x_BTW: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BTW)))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attn_norm = nn.LayerNorm(width)
        self.attn = Attention(width, heads, dropout)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = MLP(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTW: Tensor) -> Tensor:
        x_BTW = x_BTW + self.dropout(self.attn(self.attn_norm(x_BTW)))
        return x_BTW + self.dropout(self.mlp(self.mlp_norm(x_BTW)))


class GPT(nn.Module):
    """Bytes in, logits of the next byte out: [B, T] int64 -> [B, T, 256]."""

    def __init__(
        self,
        depth: int = 4,
        width: int = 128,
        context: int = 128,
        dropout: float = 0.0,
        *,
        heads: int | None = None,
        tied: bool = False,
    ) -> None:
        super().__init__()
        heads = heads or max(1, width // 32)
        self.token = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.apply(initialise)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, tokens_BT: Tensor) -> Tensor:
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTW = self.dropout(self.token(tokens_BT) + self.position(positions_T))
        for block in self.blocks:
            x_BTW = block(x_BTW)
        return self.head(self.norm(x_BTW))


def initialise(module: nn.Module) -> None:
    """GPT-2's: normal(0, 0.02) weights, zero biases."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


class Windows(Dataset[dict[str, Tensor]]):
    """Windows of `context` bytes that do not overlap; the target is the next byte."""

    def __init__(self, text: bytes, context: int) -> None:
        self.text, self.context = text, context

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.context

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = index * self.context
        piece = bytearray(self.text[start : start + self.context + 1])
        tokens = torch.frombuffer(piece, dtype=torch.uint8).long()
        return {"x": tokens[:-1], "y": tokens[1:]}


def corpus(*, held_out: bool) -> bytes:
    """The standard library's text, in the order of its file names: the same bytes every time."""
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.suffix in SUFFIXES
        and not {"site-packages", "dist-packages", "__pycache__"}.intersection(path.parts)
    )
    wanted = [n for i, n in enumerate(names) if (i % HELD_OUT_EVERY == 0) == held_out]
    return b"\n".join((root / name).read_bytes() for name in wanted)[:CORPUS_BYTES]


def training_set(context: int) -> Windows:
    """Every file but the held-out ones."""
    return Windows(corpus(held_out=False), context)


def held_out_set(context: int) -> Subset[dict[str, Tensor]]:
    """A few hundred windows, spread over the held-out files."""
    windows = Windows(corpus(held_out=True), context)
    stride = max(1, len(windows) // HELD_OUT_WINDOWS)
    return Subset(windows, range(0, len(windows), stride)[:HELD_OUT_WINDOWS])


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy per byte, in nats."""
    logits_BTV = model(batch["x"])
    return F.cross_entropy(logits_BTV.flatten(0, 1), batch["y"].flatten())


def optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """AdamW; matrices decay, norms and biases do not."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def job(
    depth: int = 4,
    width: int = 128,
    context: int = 128,
    batch: int = 32,
    lr: float = 1e-3,
    dropout: float = 0.0,
    steps: int = 300,
    seed: int = 0,
) -> mw.Job:
    """The job; every parameter is a `--set` key."""
    return mw.Job(
        model=lambda: GPT(depth, width, context, dropout),
        loss=loss,
        optimizer=lambda model: optimizer(model, lr),
        data=lambda: training_set(context),
        evaluation=lambda: held_out_set(context),
        batch_size=batch,
        steps=steps,
        seed=seed,
    )


if __name__ == "__main__":
    mw.train(job())
