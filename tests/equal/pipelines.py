"""Models for pipelines: what crosses stages, and lives at several, differs from one to the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meshwright import Job
from tests.equal.families import Tokens, own_loss
from tests.equal.families import adamw as careful
from tests.equal.mixtures import COMMON
from tests.equal.zoo_other import CLASSES, adamw, maps, pictures
from tests.equal.zoo_text import FAMILIES

BATCH = 16
"""In 3 micro-batches these are 6, 5 and 5 samples."""

NORMED = 24
"""Samples of a step where batch norm makes all micro-batches equal."""


def gpt(microbatches: int = 1) -> Job:
    """GPT-2, whose head is its embedding: the first stage and the last hold one parameter."""
    del microbatches
    return FAMILIES["gpt2"].job(3, BATCH)


def t5(microbatches: int = 1) -> Job:
    """T5: the encoder's states are read by every layer of the decoder, as are position biases."""
    del microbatches
    return FAMILIES["t5"].job(2, BATCH)


class Block(nn.Module):
    """Two convolutions with group norms around them and dropout between."""

    def __init__(self, given: int, made: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, given)
        self.first = nn.Conv2d(given, made, 3, padding=1)
        self.drop = nn.Dropout(0.1)
        self.second = nn.Conv2d(made, made, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(self.drop(F.silu(self.first(self.norm(x)))))
        return found


class UNet(nn.Module):
    """Two levels down and up; what goes down a level is read when coming up to it again."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.ModuleList([Block(width, width), Block(width, width)])
        self.middle = Block(width, width)
        self.up = nn.ModuleList([Block(2 * width, width), Block(2 * width, width)])
        self.last = nn.Conv2d(width, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        across = []
        for block in self.down:
            x = block(x)
            across.append(x)
            x = F.max_pool2d(x, 2)
        x = self.middle(x)
        for block in self.up:
            x = F.interpolate(x, scale_factor=2.0)
            x = block(torch.cat([x, across.pop()], 1))
        found: Tensor = self.last(x)
        return found


def pixels(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Summed over the pixels that count, and how many do."""
    found, labels = model(batch["pixel_values"]), batch["labels"]
    total = F.cross_entropy(found, labels, ignore_index=255, reduction="sum")
    return total, (labels != 255).sum()


def unet(microbatches: int = 1) -> Job:
    """A U-Net: skip edges over any number of stages, a sum and a weight as the loss."""
    del microbatches
    return Job(UNet, pixels, adamw, lambda: maps(8), BATCH)


class Residual(nn.Module):
    """Convolution and batch norm twice around a skip edge."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.last = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.last(self.second(F.relu(self.norm(self.first(x))))))


class ResNet(nn.Module):
    """Residual blocks with batch norm, and a classifier."""

    def __init__(self, width: int = 4, blocks: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*(Residual(width) for _ in range(blocks)))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.blocks(self.stem(x)).mean((2, 3)))
        return found


def classes(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of an image's class."""
    return F.cross_entropy(model(batch["pixel_values"]), batch["labels"])


def resnet(microbatches: int = 1) -> Job:
    """Batch norm, whose running statistics change from one micro-batch to the next."""
    made = Job(ResNet, classes, adamw, lambda: pictures(8), NORMED)
    return replace(made, normalize_over=NORMED // microbatches)


def mixtral(microbatches: int = 1) -> Job:
    """Mixtral: each layer's router scores are read again by the loss that balances experts."""
    del microbatches
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {**COMMON, "num_hidden_layers": 2, "attention_dropout": 0.1}
    config = MixtralConfig(
        **sizes, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2,
        output_router_logits=True, router_aux_loss_coef=0.1,
    )  # fmt: skip
    return Job(lambda: MixtralForCausalLM(config), own_loss, careful, Tokens, BATCH)


PIPELINES: dict[str, Callable[[int], Job]] = {
    "gpt": gpt,
    "t5": t5,
    "unet": unet,
    "resnet": resnet,
    "mixtral": mixtral,
}


def for_processes(model: str, microbatches: int = 1) -> Job:
    """One of them, as the command line names it."""
    return PIPELINES[model](microbatches)
