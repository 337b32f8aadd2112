"""Fine-tune a Hugging Face causal language model on additions: `17+25=` is to be answered by `42`.

    mw train examples/finetune.py
    mw train examples/finetune.py --set folder=/models/my-gpt2 -n 2 --plan zero3

Without `folder` a tiny GPT-2 with random weights is made once, so that nothing is downloaded. The
embeddings are frozen, the learning rate warms up and decays, batches come from a DataLoader with
a collate function, and the loss is the mean over the tokens of the answers only. What `run.export`
writes loads with `AutoModelForCausalLM.from_pretrained`.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config

import meshwright as mw

CACHE = Path.home() / ".cache" / "meshwright-examples" / "tiny-gpt2"
END = 0  # the byte that ends an answer and pads a sample
LENGTH = 12  # bytes of the longest sample, "99+99=198" and its end, rounded up
IGNORED = -100  # the label of a token that the loss leaves out
HELD_OUT_EVERY = 20


def tiny_gpt2(folder: Path = CACHE) -> Path:
    """A folder as `save_pretrained` writes it: a byte-level GPT-2 with random weights.

    Every rank may call this at once: each writes its own copy aside, and the first rename wins.
    """
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=folder.parent))
    config = GPT2Config(
        vocab_size=256, n_positions=32, n_embd=64, n_layer=2, n_head=4, initializer_range=0.1,
        bos_token_id=END, eos_token_id=END, use_cache=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(aside)
    try:
        aside.rename(folder)
    except OSError:
        shutil.rmtree(aside)
        if not (folder / "config.json").exists():  # else another rank was first
            raise
    return folder


def build(folder: str | Path) -> nn.Module:
    """The folder's model with its embeddings frozen; the values come from `Job.weights`."""
    model: nn.Module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.requires_grad_(requires_grad=False)
    return model


class Additions(Dataset[tuple[str, str]]):
    """All sums of two numbers below 100, as (question, answer)."""

    def __init__(self, *, held_out: bool) -> None:
        pairs = [(a, b) for a in range(100) for b in range(100)]
        self.pairs = [p for i, p in enumerate(pairs) if (i % HELD_OUT_EVERY == 0) == held_out]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[str, str]:
        a, b = self.pairs[index]
        return f"{a}+{b}=", str(a + b)


def collate(samples: list[tuple[str, str]]) -> dict[str, Tensor]:
    """Samples padded to one length; question and padding are left out of the loss.

    Returns `tokens` and `labels`, both int64 [B, LENGTH].
    """
    tokens = torch.full((len(samples), LENGTH), END)
    labels = torch.full((len(samples), LENGTH), IGNORED)
    for row, (question, answer) in enumerate(samples):
        text = torch.tensor([*question.encode(), *answer.encode(), END])
        tokens[row, : len(text)] = text
        labels[row, len(question) : len(text)] = text[len(question) :]
    return {"tokens": tokens, "labels": labels}


def loader(batch: int, *, held_out: bool) -> DataLoader[tuple[str, str]]:
    """An ordinary DataLoader: its dataset, collate function and workers are what is used."""
    return DataLoader(
        Additions(held_out=held_out), batch_size=batch, shuffle=True, collate_fn=collate
    )


def loss(
    model: nn.Module, batch: dict[str, Tensor]
) -> tuple[Tensor, Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Cross-entropy summed over the answers' tokens, and how many there are."""
    logits_BTV = model(input_ids=batch["tokens"]).logits[:, :-1]
    labels_BT = batch["labels"][:, 1:]
    counts = labels_BT != IGNORED
    total = F.cross_entropy(
        logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    right = ((logits_BTV.argmax(-1) == labels_BT) & counts).sum()
    return total, counts.sum(), {"accuracy": (right, counts.sum())}


def optimizer(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """AdamW over what is not frozen; matrices decay, norms and biases do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": 0.01},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr)


def warm_up_and_cosine(step: int, steps: int, warm_up: int) -> float:
    """The factor on the learning rate: up in a line, then down to a tenth along a cosine."""
    if step < warm_up:
        return (step + 1) / warm_up
    done = min(1.0, (step - warm_up) / max(1, steps - warm_up))
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def job(
    folder: str = "",
    batch: int = 64,
    lr: float = 2e-3,
    steps: int = 500,
    warm_up: int = 20,
    seed: int = 0,
) -> mw.Job:
    """The job; every parameter is a `--set` key."""
    source = folder or tiny_gpt2()
    return mw.Job(
        model=lambda: build(source),
        loss=loss,
        optimizer=lambda model: optimizer(model, lr),
        schedule=lambda opt: LambdaLR(opt, lambda s: warm_up_and_cosine(s, steps, warm_up)),
        data=lambda: loader(batch, held_out=False),
        evaluation=lambda: loader(batch, held_out=True),
        batch_size=batch,
        weights=str(source),
        clip_norm=1.0,
        steps=steps,
        seed=seed,
    )


if __name__ == "__main__":
    mw.train(job())
