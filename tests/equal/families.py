"""Four families of `transformers`, from configurations, as users would write jobs for them.

Each: one layer, width 32, random weights, synthetic data that a step's number does not repeat.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from meshwright import Job

VOCABULARY = 48
LENGTH = 8
BATCH = 16


class Tokens(Dataset[dict[str, Tensor]]):
    """Sequences of random tokens; one in five is masked where `masked`."""

    def __init__(self, count: int = 160, *, masked: bool = False) -> None:
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(4, VOCABULARY, (count, LENGTH), generator=generator)
        self.hidden = torch.rand(count, LENGTH, generator=generator) < (0.2 if masked else 0.0)
        self.masked = masked

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens, hidden = self.tokens[index], self.hidden[index]
        if not self.masked:
            return {"input_ids": tokens, "labels": tokens}
        return {
            "input_ids": tokens.masked_fill(hidden, 3),
            "labels": tokens.masked_fill(~hidden, -100),
            "attention_mask": (torch.arange(LENGTH) < LENGTH - index % 3).long(),
        }


class Images(Dataset[dict[str, Tensor]]):
    """Random images [3, 8, 8] and labels below 5."""

    def __init__(self, count: int = 160) -> None:
        generator = torch.Generator().manual_seed(2)
        self.images = torch.randn(count, 3, 8, 8, generator=generator)
        self.labels = torch.randint(0, 5, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with BERT's eps.

    A key bias has true gradient zero; Adam divides what rounding leaves of it by its eps, and
    torch's 1e-8 would make 1e-18 of noise a visible update.
    """
    return torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6, weight_decay=0.1)


def own_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss that the family itself computes: a mean over the samples' tokens."""
    return model(**batch).loss


def masked_loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Summed over the hidden tokens, and how many there are."""
    labels = batch["labels"].flatten()
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    total = F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=-100, reduction="sum")
    return total, (labels != -100).sum()


def gpt2(batch: int = BATCH) -> Job:
    """GPT-2, tied embeddings, dropout 0.1 in three places; the loss it computes itself."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=32, n_layer=1, n_head=4,
        bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    return Job(lambda: GPT2LMHeadModel(config), own_loss, adamw, Tokens, batch)


def llama(batch: int = BATCH) -> Job:
    """Llama with grouped queries; its norm and rotary tables cast to float32 by themselves."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=LENGTH,
        attention_dropout=0.1, use_cache=False,
    )  # fmt: skip
    return Job(lambda: LlamaForCausalLM(config), own_loss, adamw, Tokens, batch)


def bert(batch: int = BATCH) -> Job:
    """BERT's masked language model with padding, a sum and a weight as the loss."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=LENGTH,
    )  # fmt: skip
    return Job(
        lambda: BertForMaskedLM(config), masked_loss, adamw, lambda: Tokens(masked=True), batch
    )


def vit(batch: int = BATCH) -> Job:
    """A vision transformer that classifies, dropout 0.1."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        image_size=8, patch_size=4, num_labels=5, hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    )  # fmt: skip
    return Job(lambda: ViTForImageClassification(config), own_loss, adamw, Images, batch)


FAMILIES: dict[str, Callable[..., Job]] = {"gpt2": gpt2, "llama": llama, "bert": bert, "vit": vit}
